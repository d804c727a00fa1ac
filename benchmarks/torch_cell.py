"""A network of NAS-Bench-201 in PyTorch, for `benchmarks.cell_cost`; see `benchmarks.torch_step`.

A case has beside `arrays`: `cell`, its digits by target and source; `sizes`, those of a
`CellNetwork` in its order; `channels_last`, and of the optimizer `rate`, `weight_decay` and
`total_steps`. The arrays hold the weights by their names in a `CellNetwork`, after `params/`.
"""

import copy

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks import torch_step


class Edge(nn.Module):
    """BN(W σ(z)), the convolution named by its size as ours."""

    def __init__(self, width: int, size: int):
        super().__init__()
        convolution = nn.Conv2d(width, width, size, padding=size // 2, bias=False)
        self.add_module(f"convolution_{size}", convolution)
        self.normalization = nn.BatchNorm2d(width)

    def forward(self, features):
        convolution, normalization = self.children()
        return normalization(convolution(torch.relu(features)))


class Cell(nn.Module):
    def __init__(self, cell, width: int):
        super().__init__()
        self.cell = cell
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.edges = nn.ModuleDict(
            {
                f"{sender}_{receiver}": Edge(width, {2: 1, 3: 3}[digit])
                for receiver, digits in enumerate(cell, 1)
                for sender, digit in enumerate(digits)
                if digit in (2, 3)
            }
        )

    def forward(self, features):
        vertices = [features]
        for receiver, digits in enumerate(self.cell, 1):
            terms = [
                self.edge(f"{sender}_{receiver}", digit, vertices[sender])
                for sender, digit in enumerate(digits)
                if digit
            ]
            vertices.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(features))
        return vertices[-1]

    def edge(self, name: str, digit: int, features):
        if digit == 1:
            return features
        return self.pool(features) if digit == 4 else self.edges[name](features)


class Reduction(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.convolution_a = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.normalization_a = nn.BatchNorm2d(2 * width)
        self.convolution_b = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.normalization_b = nn.BatchNorm2d(2 * width)
        self.pool = nn.AvgPool2d(2, stride=2)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, bias=False)

    def forward(self, features):
        halved = self.normalization_a(self.convolution_a(torch.relu(features)))
        halved = self.normalization_b(self.convolution_b(torch.relu(halved)))
        return halved + self.shortcut(self.pool(features))


class Network(nn.Module):
    def __init__(self, cell, in_channels: int, channels: int, count: int, num_classes: int):
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stem_normalization = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList(
            [nn.ModuleList([Cell(cell, width) for _ in range(count)]) for width in widths]
        )
        self.reductions = nn.ModuleList([Reduction(width) for width in widths[:-1]])
        self.normalization = nn.BatchNorm2d(widths[-1])
        self.readout = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        features = self.stem_normalization(self.stem(images))
        for stage, cells in enumerate(self.stages):
            if stage:
                features = self.reductions[stage - 1](features)
            for cell in cells:
                features = cell(features)
        features = torch.relu(self.normalization(features))
        return self.readout(features.mean((2, 3)))


class CellCase(torch_step.Case):
    """Trained as the benchmark does: SGD with Nesterov's momentum, decay, cosine rates."""

    def __init__(self, arrays, cell, sizes, channels_last: bool, rate: float, **options):
        super().__init__(arrays, channels_last)
        self.rate, self.total_steps = rate, options["total_steps"]
        self.weight_decay = options["weight_decay"]
        self.network = Network(cell, *sizes).to(self.images.dtype)
        state = self.network.state_dict()
        self.network.load_state_dict(state | weights_of(arrays))
        self.network.to(memory_format=self.memory_format)
        self.start = copy.deepcopy(self.network.state_dict())

    def loss(self, images, labels):
        return nn.functional.cross_entropy(self.network(images), labels)

    def restart(self):
        self.network.load_state_dict(self.start)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=self.rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.total_steps)

    def update(self):
        self.optimizer.step()
        self.schedule.step()


def weights_of(arrays):
    """Returns the arrays as a state of `Network`."""
    found = {}
    for name, values in arrays.items():
        if name.startswith("params/"):
            *module, leaf = name.split("/")[1:]
            layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[values.ndim]
            key = ".".join([*module, "bias" if leaf == "bias" else "weight"])
            found[key] = values.permute(layout)
    return found


if __name__ == "__main__":
    torch_step.serve(CellCase)
