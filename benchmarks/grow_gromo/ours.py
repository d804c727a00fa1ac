"""Trainings of ours that grow by TINY, a process that `benchmarks.grow_gromo` starts."""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._trees import PyTree, named_leaves, with_leaves
from benchmarks import common
from benchmarks.grow_gromo import cases
from experiments import grow_study

LAYERS = ("stem", "layers/0_1", "layers/1_2", "layers/2_3", "readout")
"""Of the network `mlp` of the study, in their order."""
OPTIMIZER = optax.sgd(1.0, momentum=cases.MOMENTUM)
"""Rates are arguments of an update, so that they compile nothing."""
PARTS = {"measure": "statistics", "solve": "solution", "search_amplitude": "search"}
"""Functions of `grow`, and the phases that they are timed as."""


def create(dataset: str, data_dir: str | None, width: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the weights at the start by layer, drawn as the study draws them."""
    network, _ = grow_study.build("mlp", dataset, data_dir, 1)
    leaves = named_leaves(grow_study.create("mlp", network, width, seed))
    return {
        f"{what}{index}": np.asarray(leaves[f"{layer}/{what}"])
        for index, layer in enumerate(LAYERS)
        for what in ("kernel", "bias")
    }


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a case; JSON values.

    Raises:
      ValueError: of `grow`, where layers are dead or statistics not finite.
    """
    return Training(case, cases.Data(case)).run()


@functools.partial(jax.jit, static_argnames="loss")
def update(loss, params: PyTree, state: Any, batch: Any, rate: jax.Array):
    """Makes one update; returns params and the optimizer's state."""
    gradients = jax.grad(loss)(params, batch)
    updates, state = OPTIMIZER.update(gradients, state, params)
    return jax.tree.map(lambda old, change: old + rate * change, params, updates), state


class Training:
    """A case, and the network that it trains."""

    def __init__(self, case: Mapping[str, Any], data: cases.Data):
        self.case, self.data = case, data
        self.network, found = grow_study.build("mlp", case["dataset"], case["data_dir"], 1)
        by_producer = {group.producers[0]: group for group in found}
        self.groups = tuple(by_producer[f"{layer}/kernel"] for layer in LAYERS[:-1])
        self.side = self.network.dataset.train_images.shape[1:]
        start = grow_study.create("mlp", self.network, case["start_width"], 0)
        leaves = {
            f"{layer}/{what}": jnp.asarray(array)
            for layer, pair in zip(LAYERS, data.layers(), strict=True)
            for what, array in zip(("kernel", "bias"), pair, strict=True)
        }
        self.start = with_leaves(start, leaves)

    def run(self) -> dict[str, Any]:
        """Trains; `programs` are those compiled on the way."""
        clock, params = cases.Clock(), self.start
        state = OPTIMIZER.init(params)
        found: dict[str, Any] = {"widths": [self._widths(params)], "losses": [], "amplitudes": []}
        stretches = []
        with common.Compilations() as compilations, self._timed(clock, found):
            for growth in range(self.case["growths"] + 1):
                stretches.append(params)
                with clock.phase("training"):
                    params, state = self._train(params, state, growth)
                if growth < self.case["growths"]:
                    with clock.phase("growing"):
                        grown = self._grow(params, state, growth)
                    params, state = grown.params, grown.optimizer_state
                    found["widths"].append(self._widths(params))
                    found["amplitudes"].append(grown.amplitude)
        return found | {
            "accuracy": self._accuracy(params),
            "capacity": [self._capacity(one) for one in stretches],
            "programs": compilations.count,
            "compile_seconds": compilations.seconds,
            **clock.summary(),
        }

    def _train(self, params: PyTree, state: Any, growth: int) -> tuple[PyTree, Any]:
        first = growth * self.case["interval"]
        last = growth == self.case["growths"]
        end = self.case["steps"] if last else first + self.case["interval"]
        for step in range(first, end):
            batch = self._batch(self.data.arrays["batches"][step])
            rate = np.float32(cases.rate(self.case, step))
            params, state = update(self.network.loss, params, state, batch, rate)
        return jax.block_until_ready((params, state))

    def _grow(self, params: PyTree, state: Any, growth: int) -> archscale.contrib.Growth:
        group = self.groups[growth % len(self.groups)]
        number = archscale.contrib.count_neurons(params, [group])[group.name]
        held_out = np.arange(-self.case["held_out"], 0)
        used = self.case["as_used"]
        return archscale.grow(
            self.network.loss,
            params,
            [self._batch(self.data.arrays["growths"][growth])],
            self._batch(held_out),
            [group],
            number=number,
            threshold=self.case["threshold"],
            normalize=used,
            amplitudes=self.case["amplitudes"],
            capacity=archscale.contrib.geometric(2.0) if used else int,
            optimizer=lambda params: OPTIMIZER,
            optimizer_state=state,
        )

    def _batch(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = self.data.train_images[chosen].reshape(-1, *self.side)
        return images, self.data.train_labels[chosen]

    @contextlib.contextmanager
    def _timed(self, clock: cases.Clock, found: dict[str, Any]) -> Iterator[None]:
        """Times the parts of `grow`, and notes the held-out losses at the amplitudes."""
        module = importlib.import_module("archscale_jax.contrib._growth.grow")

        def timed(name: str):
            function = getattr(module, name)

            def call(*arguments: Any, **options: Any) -> Any:
                with clock.phase(PARTS[name]):
                    result = jax.block_until_ready(function(*arguments, **options))
                if name == "search_amplitude":
                    found["losses"].append([result[0], *result[1]])
                return result

            return mock.patch.object(module, name, call)

        with contextlib.ExitStack() as stack:
            for name in PARTS:
                stack.enter_context(timed(name))
            yield

    def _widths(self, params: PyTree) -> list[int]:
        neurons = archscale.contrib.count_neurons(params, self.groups)
        hidden = [neurons[group.name] for group in self.groups]
        return [int(np.prod(self.side)), *hidden, self.network.dataset.num_classes]

    def _capacity(self, params: PyTree) -> list[int]:
        leaves = named_leaves(params)
        hidden = [group.capacity(leaves) for group in self.groups]
        return [int(np.prod(self.side)), *hidden, self.network.dataset.num_classes]

    def _accuracy(self, params: PyTree) -> float:
        images = self.data.test_images.reshape(-1, *self.side)
        logits = np.asarray(jax.jit(self.network.apply)(params, images))
        finite = bool(np.all(np.isfinite(logits)))
        return float(np.mean(logits.argmax(axis=-1) == self.data.test_labels)) if finite else 0.1


if __name__ == "__main__":
    cases.serve(run)
