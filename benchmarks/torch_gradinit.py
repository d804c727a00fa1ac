"""The package `gradinit` in PyTorch, for `benchmarks.gradinit_cost`; see `benchmarks.torch_step`.

A case has beside `arrays`: `limit`, the gradient norm γ; `scale_rate` of Adam, which moves the
multipliers; `channels_last`. The arrays hold the weights of a `PlainNetwork` without normalization
by their names, after `params/`.
"""

import time

import torch  # pyright: ignore[reportMissingImports]
from gradinit import GradInitWrapper  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks import torch_step
from benchmarks.torch_cell import weights_of

SCALE = "_gradinit_scale_factor"
"""What the package appends to the name of a tensor, to name its multiplier."""


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, features):
        return torch.relu(self.convolution(features))


class PlainNetwork(nn.Module):
    """Convolutions in stages, max pooling between them, the mean over positions, a readout."""

    def __init__(self, weights):
        super().__init__()
        stages: list[list[nn.Module]] = []
        for name, values in weights.items():
            _, stage, *rest = name.split(".")
            if rest and rest[-1] == "weight":
                while int(stage) >= len(stages):
                    stages.append([])
                stages[-1].append(Layer(values.shape[1], values.shape[0]))
        self.stages = nn.ModuleList([nn.ModuleList(one) for one in stages])
        self.readout = nn.Linear(*reversed(weights["readout.weight"].shape))

    def forward(self, images):
        features = images
        for index, stage in enumerate(self.stages):
            if index:
                features = nn.functional.max_pool2d(features, 2)
            for layer in stage:
                features = layer(features)
        return self.readout(features.mean((2, 3)))


class GradInitCase(torch_step.Case):
    """Learns multipliers from the same weights at every call."""

    def __init__(self, arrays, limit: float, scale_rate: float, channels_last: bool):
        super().__init__(arrays, channels_last)
        self.limit, self.scale_rate = limit, scale_rate
        self.weights = weights_of(arrays)

    def run(self, steps: int):
        """Answers with what the package saw, and the multipliers by the names of our tensors.

        Of every iteration the loss, and whether it lowered the norm; of the first the derivatives
        by the multipliers.
        """
        network = PlainNetwork(self.weights).to(self.images.dtype)
        network.load_state_dict(self.weights)
        network.to(memory_format=self.memory_format)
        losses, constrained, derivatives = [], [], {}
        with GradInitWrapper(network) as wrapper:
            scales = dict(network.named_parameters())  # they alone are parameters now
            optimizer = torch.optim.Adam(scales.values(), lr=self.scale_rate)
            begin = time.perf_counter()
            for batch in self.batches[:steps]:
                optimizer.zero_grad()
                logits = network(self.images[batch])
                loss = nn.functional.cross_entropy(logits, self.labels[batch])
                found = wrapper.grad_loss(loss, norm=2, gamma=self.limit)
                found.backward()
                losses.append(loss.detach())
                constrained.append(found is not loss)
                if not derivatives:
                    derivatives = {name: one.grad.item() for name, one in scales.items()}
                optimizer.step()
                wrapper.clamp_scales()
            values = torch.stack(losses).tolist()  # waits
            seconds = time.perf_counter() - begin
            learned = {name: one.item() for name, one in scales.items()}
        return {
            "seconds": seconds,
            "losses": values,
            "constrained": constrained,
            "derivatives": by_our_names(derivatives),
            "multipliers": by_our_names(learned),
        }


def by_our_names(values):
    """Returns what the package has by its names, by the names of tensors in Flax."""
    found = {}
    for name, value in values.items():
        *module, leaf = name.removesuffix(SCALE).split(".")
        found["/".join([*module, "kernel" if leaf == "weight" else leaf])] = value
    return found


if __name__ == "__main__":
    torch_step.serve(GradInitCase)
