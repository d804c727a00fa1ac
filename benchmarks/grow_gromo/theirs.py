"""Trainings of the package gromo that grow, a process that `benchmarks.grow_gromo` starts."""

import importlib.metadata
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from gromo.containers.growing_mlp import GrowingMLP  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.grow_gromo import cases

CUTOFF = 1e-6
"""Of ours: eigenvalues of S below this part of the largest count as 0."""


def create(case: Mapping[str, Any], data: cases.Data):
    """Returns the package's perceptron with the weights of the case."""
    layers = data.layers()
    model = GrowingMLP(
        in_features=len(layers[0][0]),
        out_features=len(layers[-1][1]),
        hidden_size=case["start_width"],
        number_hidden_layers=len(layers) - 1,
        activation=nn.ReLU(),
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for layer, (kernel, bias) in zip(model.layers, layers, strict=True):
            layer.weight.copy_(torch.from_numpy(kernel.T))
            layer.bias.copy_(torch.from_numpy(bias))
    return model


class Training:
    """A case, and the data that it trains on."""

    def __init__(self, case: Mapping[str, Any], data: cases.Data):
        self.case, self.data = case, data
        self.images = torch.from_numpy(data.train_images)
        self.labels = torch.from_numpy(data.train_labels).long()

    def run(self) -> dict[str, Any]:
        """Trains."""
        model, clock = create(self.case, self.data), cases.Clock()
        optimizer = self._optimizer(model)
        found: dict[str, Any] = {"widths": [widths(model)], "losses": [], "amplitudes": []}
        for growth in range(self.case["growths"] + 1):
            with clock.phase("training"):
                self._train(model, optimizer, growth)
            if growth < self.case["growths"]:
                with clock.phase("growing"):
                    losses, amplitude = self._grow(model, clock, growth)
                    optimizer = self._optimizer(model, optimizer)
                found["losses"].append(losses)
                found["amplitudes"].append(amplitude)
                found["widths"].append(widths(model))
        return found | {"accuracy": self._accuracy(model), **clock.summary()}

    def _train(self, model, optimizer, growth: int) -> None:
        first = growth * self.case["interval"]
        last = growth == self.case["growths"]
        end = self.case["steps"] if last else first + self.case["interval"]
        model.train()
        for step in range(first, end):
            chosen = torch.from_numpy(self.data.arrays["batches"][step])
            optimizer.param_groups[0]["lr"] = cases.rate(self.case, step)
            optimizer.zero_grad()
            logits = model(self.images[chosen])
            nn.functional.cross_entropy(logits, self.labels[chosen]).backward()
            optimizer.step()

    def _optimizer(self, model, previous=None):
        """Returns a new optimizer, as parameters are new tensors after a growth.

        Momentum is carried over, 0 for new entries, as ours is; as the package is used it is not.
        """
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.case["rate"], momentum=cases.MOMENTUM
        )
        if previous is not None and not self.case["as_used"]:
            pairs = zip(
                previous.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
            )
            for old, new in pairs:
                buffer = torch.zeros_like(new)
                kept = tuple(slice(size) for size in old.shape)
                buffer[kept] = previous.state[old]["momentum_buffer"]
                optimizer.state[new]["momentum_buffer"] = buffer
        return optimizer

    def _grow(self, model, clock: cases.Clock, growth: int) -> tuple[list[float], float]:
        """Grows one hidden layer; returns the held-out losses at the amplitudes, and the best."""
        layer = growth % (len(model.layers) - 1)
        number = model.layers[layer].out_features
        dtype = torch.float64 if self.case["bits"] == 64 else torch.float32
        model.to(dtype).eval()
        model.set_growing_layers(index=layer)
        with clock.phase("statistics"):
            chosen = torch.from_numpy(self.data.arrays["growths"][growth])
            model.init_computation()
            model.zero_grad()
            logits = model(self.images[chosen].to(dtype))
            nn.functional.cross_entropy(logits, self.labels[chosen], reduction="sum").backward()
            # A statistic that TINY does not use; the tutorial takes it all the same.
            model.update_computation(update_covariance_loss_gradient=self.case["as_used"])
        with clock.phase("solution"):
            model.compute_optimal_updates(
                maximum_added_neurons=number,
                statistical_threshold=self.case["threshold"],
                numerical_threshold=self._cutoff(model),
                compute_delta=self.case["as_used"],
                dtype=dtype,
            )
            model.to(dtype)  # the bias of the extension is always of 32 bits
            if not self.case["as_used"]:
                turn(model.layers[layer], model.layers[layer + 1])
            model.reset_computation()
            model.layers[layer].store_input = False
            model.dummy_select_update()
        amplitudes = self.case["amplitudes"]
        with clock.phase("search"):
            losses = [self._held_out(model, amplitude, dtype) for amplitude in amplitudes]
        best = amplitudes[int(np.nanargmin(losses))]
        model.set_scaling_factor(best)
        model.apply_change()
        model.to(torch.float32)
        return losses, best

    def _cutoff(self, model) -> float:
        """The package's threshold is absolute; in 64 bits it is that of ours."""
        if self.case["bits"] == 32:
            return CUTOFF
        covariance = model._growing_layers[0].tensor_s_growth()
        return CUTOFF * torch.linalg.eigvalsh(covariance)[-1].item()

    @torch.no_grad()
    def _held_out(self, model, amplitude: float, dtype) -> float:
        model.set_scaling_factor(amplitude)
        count = self.case["held_out"]
        logits = model.extended_forward(self.images[-count:].to(dtype))
        return nn.functional.cross_entropy(logits, self.labels[-count:]).item()

    @torch.no_grad()
    def _accuracy(self, model) -> float:
        logits = model.eval()(torch.from_numpy(self.data.test_images))
        if not torch.isfinite(logits).all():
            return 0.1
        right = logits.argmax(dim=1) == torch.from_numpy(self.data.test_labels)
        return right.double().mean().item()


def turn(made, read) -> None:
    """Turns new neurons so that the largest entry of every fan-out is positive, as ours are.

    Which of both signs a decomposition gives is up to rounding, and ReLU tells them apart.
    """
    with torch.no_grad():
        fan_out, new = read.extended_input_layer.weight, made.extended_output_layer
        largest = fan_out.abs().argmax(dim=0, keepdim=True)
        sign = torch.where(fan_out.gather(0, largest)[0] < 0, -1.0, 1.0).to(fan_out.dtype)
        fan_out *= sign
        new.weight *= sign[:, None]
        new.bias *= sign


def widths(model) -> list[int]:
    """Inputs, neurons of every hidden layer, outputs."""
    return [model.layers[0].in_features, *(layer.out_features for layer in model.layers)]


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a case; JSON values.

    Raises:
      ValueError: what the package raises.
    """
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = Training(case, cases.Data(case)).run()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
    texts = sorted({str(one.message).partition("\n")[0][:120] for one in caught})
    versions = {name: importlib.metadata.version(name) for name in ("gromo", "torch")}
    return result | {"programs": 0, "warnings": texts, "versions": versions}


if __name__ == "__main__":
    cases.serve(run)
