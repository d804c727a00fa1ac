"""A training step in PyTorch, for `benchmarks.lr_cost`, which runs this module where PyTorch is.

Reads lines of JSON from stdin and answers each with one on stdout. The first line holds `threads`
and `cases`: name -> {"arrays": path of an .npz file, "rate", "channels_last"}, and `threads` where
they differ. Every other one is {"case": name, "steps": n}, and is answered with the seconds of n
steps and with their losses, taken before each update. The weights are set back before every answer.

The arrays: `images` [n, height, width, channels], `labels` [n], `batches` [steps, batch], and
`kernel_0`, `bias_0`, `kernel_1`, … of the stem, the layers of a chain and the readout, laid out as
Flax does. With kernels of convolutions the readout's input is averaged over positions.
"""

import json
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


class Case:
    """What is trained: data, a loss and its optimizer."""

    optimizer: torch.optim.Optimizer

    def __init__(self, arrays, channels_last: bool):
        self.labels, self.batches = arrays["labels"].long(), arrays["batches"].long()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        images = arrays["images"].permute(0, 3, 1, 2)
        self.images = images.contiguous(memory_format=self.memory_format)

    def loss(self, images, labels):
        raise NotImplementedError

    def restart(self):
        """Sets weights and optimizer back."""
        raise NotImplementedError

    def update(self):
        self.optimizer.step()

    def run(self, steps: int):
        self.restart()
        losses = []
        begin = time.perf_counter()
        for batch in self.batches[:steps]:
            self.optimizer.zero_grad()
            loss = self.loss(self.images[batch], self.labels[batch])
            loss.backward()
            self.update()
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()  # waits
        return {"seconds": time.perf_counter() - begin, "losses": values}


class Chain(Case):
    """A chain z_0 = W x, z_v = W σ(z_u), y = W σ(z_last)."""

    def __init__(self, arrays, rate: float, channels_last: bool):
        super().__init__(arrays, channels_last)
        count = sum(name.startswith("kernel") for name in arrays)
        self.convolution = arrays["kernel_0"].ndim == 4
        if not self.convolution:
            self.images = arrays["images"].flatten(1)
        self.start = []
        for layer in range(count):
            self.start += [self.as_torch(arrays[f"kernel_{layer}"]), arrays[f"bias_{layer}"]]
        self.params = [values.clone().requires_grad_() for values in self.start]
        self.optimizer = torch.optim.SGD(self.params, lr=rate)

    def as_torch(self, kernel):
        if kernel.ndim == 2:
            return kernel.T.contiguous()
        return kernel.permute(3, 2, 0, 1).contiguous(memory_format=self.memory_format)

    def loss(self, images, labels):
        functional = torch.nn.functional
        pairs = list(zip(self.params[::2], self.params[1::2], strict=True))
        features = images
        for layer, (kernel, bias) in enumerate(pairs[:-1]):
            if layer:
                features = functional.relu(features)
            if self.convolution:
                features = functional.conv2d(features, kernel, bias, padding="same")
            else:
                features = functional.linear(features, kernel, bias)
        features = functional.relu(features)
        if self.convolution:
            features = features.mean((2, 3))
        return functional.cross_entropy(functional.linear(features, *pairs[-1]), labels)

    def restart(self):
        with torch.no_grad():
            for values, start in zip(self.params, self.start, strict=True):
                values.copy_(start)


def serve(create):
    """Answers orders, of cases that `create` makes of arrays and options; see the module."""
    config = json.loads(sys.stdin.readline())
    torch.set_num_threads(config["threads"])
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    cases, threads = {}, {}
    for name, case in config["cases"].items():
        threads[name] = case.pop("threads", config["threads"])
        with np.load(case.pop("arrays")) as arrays:
            tensors = {key: torch.from_numpy(np.array(values)) for key, values in arrays.items()}
        cases[name] = create(tensors, **case)
    print(json.dumps(found), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(threads[order["case"]])
        print(json.dumps(cases[order["case"]].run(order["steps"])), flush=True)


if __name__ == "__main__":
    serve(Chain)
