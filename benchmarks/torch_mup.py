"""Trainings of perceptrons by the package `mup` in PyTorch, run by `benchmarks.width_against_mup`.

Reads a list of cases as JSON from standard input and writes the list of their losses. A case has
`sizes` and `base`, the features of its layers and of those of the base network, `params`, kernels
[in, out] and biases of every layer, `x` [n, in], `y` [n], `optimizer` and `updates`.
"""

import itertools
import json
import sys

import torch  # pyright: ignore[reportMissingImports]
from mup import (  # pyright: ignore[reportMissingImports]
    MuAdam,
    MuAdamW,
    MuReadout,
    MuSGD,
    set_base_shapes,
)

OPTIMIZERS = {
    "sgd": (MuSGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd with decay": (MuSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (MuAdam, {"lr": 1e-2, "eps": 1e-30}),
    "adamw": (MuAdamW, {"lr": 1e-2, "eps": 1e-30, "weight_decay": 0.1}),
}


def network(sizes):
    pairs = list(itertools.pairwise(sizes))
    hidden = [part for pair in pairs[:-1] for part in (torch.nn.Linear(*pair), torch.nn.Tanh())]
    return torch.nn.Sequential(*hidden, MuReadout(*pairs[-1]))


def losses(case):
    model = network(case["sizes"])
    pairs = zip(case["sizes"], case["base"], strict=True)
    delta = network([base + (size != base) for size, base in pairs])
    set_base_shapes(model, network(case["base"]), delta=delta)
    with torch.no_grad():
        for layer, (kernel, bias) in zip(model[::2], case["params"], strict=True):
            # The same function: mup divides what its readout computes by the ratio of widths.
            multiplier = layer.width_mult() if isinstance(layer, MuReadout) else 1
            layer.weight.copy_(torch.tensor(kernel).T * multiplier)
            layer.bias.copy_(torch.tensor(bias))
    create, options = OPTIMIZERS[case["optimizer"]]
    weights, biases = (
        [one for one in model.parameters() if (one.ndim == 1) == is_bias]
        for is_bias in (False, True)
    )
    decay = options.get("weight_decay", 0.0)
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = create(groups, **options)
    x, y = torch.tensor(case["x"]), torch.tensor(case["y"])
    found = []
    for _ in range(case["updates"]):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print(json.dumps([losses(case) for case in json.load(sys.stdin)]))
