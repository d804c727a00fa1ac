"""What a few steps of the whole optimizer change in networks of several sizes.

Every network is drawn and trained as its parametrization says, through `plan.apply`, or as the
framework draws it with one rate for all leaves. What is measured, over a fixed batch, is the root
mean square change of every vertex and of the logits since initialization, and their size there.
"""

import bisect
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from archscale_jax.rules._residual import residual_branches
from tests.coordinate_networks import FAMILIES

LOGITS, STREAM = "logits", "stream"
ADAM_OF_MUON = 0.15
"""The rate of Muon's Adam over its own: 0.003 beside the usual 0.02."""


class Training(NamedTuple):
    """How networks are trained.

    Attributes:
      optimizer: see `archscale_jax.parametrize`.
      rate: learning rate of the base.
      decay: weight decay of the base.
      epsilon: Adam's, in units of the root mean square gradient of the base; None: optax's own.
      options: of `parametrize`.
      standard: whether the framework draws the weights, and one rate serves all.
    """

    optimizer: str = "adamw"
    rate: float = 0.005
    decay: float = 0.1
    epsilon: float | None = None
    options: Mapping[str, Any] = {}
    standard: bool = False


CASES: dict[str, tuple[str, float, float | None, dict[str, Any] | None]] = {
    # optimizer, rate, epsilon over the base's gradient, options of parametrize or None: standard
    "AdamW": ("adamw", 3e-3, None, {}),
    "AdamW, large ε": ("adamw", 3e-2, 10.0, {}),
    "AdamW, large ε, as gradients": ("adamw", 3e-2, 10.0, {"epsilon_rule": "gradient"}),
    "Muon": ("muon", 2e-2, None, {}),
    "AdamW, standard": ("adamw", 3e-3, None, None),
}


class Sized:
    """A network of one size, compiled once for all trainings of one parametrization."""

    def __init__(
        self, family: str, sizes: Mapping[str, int], base: "Sized | None", training: Training
    ):
        self.family = FAMILIES[family]
        inputs, _ = self.family.batch(0)
        self.module = self.family.make(**sizes)
        self.plan = archscale.parametrize(
            self.module, inputs, base=base and base.plan, optimizer=training.optimizer,
            model_kwargs=self.family.keywords, **training.options,
        )  # fmt: skip
        self.standard = training.standard
        self.optimizer = training.optimizer

    @functools.cached_property
    def draw(self) -> Callable[[int], PyTree]:
        if not self.standard:
            return lambda seed: self.plan.init(jax.random.key(seed))
        inputs, _ = self.family.batch(0)

        @jax.jit
        def init(key):
            return {"params": self.module.init(key, inputs, **self.family.keywords)["params"]}

        return lambda seed: init(jax.random.key(seed))

    def apply(self, params: PyTree, inputs: Any) -> jax.Array:
        if self.standard:
            return self.plan._model.apply(params, inputs)
        return self.plan.apply(params, inputs)

    @functools.cached_property
    def gradient(self) -> Callable[..., tuple[jax.Array, PyTree]]:
        def loss(params, inputs, labels):
            logits = self.apply(params, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.jit(jax.value_and_grad(loss))

    @functools.cached_property
    def features(self) -> Callable[[PyTree, Any], dict[Any, jax.Array]]:
        def features(params, inputs):
            found = archscale.vertex_features(self.plan._model.apply, params, inputs)
            return found, self.apply(params, inputs)

        return jax.jit(features)

    def transformation(self, rate, decay, eps) -> optax.GradientTransformation:
        options = {} if self.optimizer == "sgd" else {"eps": eps}
        if self.optimizer == "muon":
            options["adam_learning_rate"] = ADAM_OF_MUON * rate
        if not self.standard:
            return self.plan.optimizer(rate, decay, **options)
        if self.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=decay, eps=eps)
        if self.optimizer == "muon":
            return optax.contrib.muon(rate, weight_decay=decay, **options)
        return optax.sgd(rate)

    @functools.cached_property
    def update(self) -> Callable[..., tuple[PyTree, Any]]:
        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def update(gradients, state, params, rate, decay, eps):
            tx = self.transformation(rate, decay, eps)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return update

    def changes(
        self, training: Training, eps: float, seed: int, steps: int = 5
    ) -> dict[Any, tuple[float, float]]:
        """Trains, and returns the change and the first size of every vertex and of the logits."""
        params = self.draw(seed)
        fixed, _ = self.family.batch(0)
        before, logits = jax.device_get(self.features(params, fixed))
        before = {**before, LOGITS: logits}
        state = self.transformation(0.0, 0.0, 1e-8).init(params)
        for step in range(steps):
            _, gradients = self.gradient(params, *self.family.batch(step))
            params, state = self.update(
                gradients, state, params, training.rate, training.decay, eps
            )
        after, logits = jax.device_get(self.features(params, fixed))
        after = {**after, LOGITS: logits}
        return {
            vertex: (rms(np.asarray(after[vertex], np.float64) - one), rms(one))
            for vertex, one in before.items()
        }

    @functools.cached_property
    def kinds(self) -> dict[str, list[Any]]:
        return kinds(self.plan.architecture)

    @functools.cached_property
    def progress(self) -> dict[Any, float]:
        """Of every vertex, the share of all branches that has been added before it."""
        added = sorted(residual_branches(self.plan.architecture))
        vertices = range(int(self.plan.architecture.graph.n_node[0]))
        whole = max(len(added), 1)
        return {LOGITS: 1.0} | {one: bisect.bisect(added, one) / whole for one in vertices}


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def root_mean_square(tree: PyTree) -> float:
    """Over all entries of all leaves."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return math.sqrt(sum(np.sum(one**2) for one in leaves) / sum(one.size for one in leaves))


def kinds(architecture: archscale.Architecture) -> dict[str, list[Any]]:
    """Vertices by the layers that end in them, without the numbers of blocks."""
    graph = architecture.graph
    branches = residual_branches(architecture)
    names: dict[Any, str] = {}
    for vertex in range(int(graph.n_node[0])):
        edges = np.flatnonzero(graph.receivers == vertex)
        layers = sorted({
            re.sub(r"\d+", "", name.removeprefix("params/").removesuffix("/kernel")).strip("/")
            for edge in edges for name in (architecture.functions or ())[edge].weights
        })  # fmt: skip
        sources = sorted({names[int(graph.senders[edge])] for edge in edges})
        if vertex in branches:
            names[vertex] = STREAM
        elif layers:
            names[vertex] = " + ".join(layers)
        else:
            names[vertex] = f"of ({', '.join(sources)})" if sources else "stem"
    found: dict[str, list[Any]] = {LOGITS: [LOGITS]}
    for vertex, name in names.items():
        found.setdefault(name, []).append(vertex)
    return found


def measure(trial: dict[str, Any]) -> dict[str, Any]:
    """Returns the changes of a vertex of every kind that all sizes have, by size."""
    optimizer, rate, epsilon, options = CASES[trial["case"]]
    training = Training(optimizer, rate, 0.1, epsilon, options or {}, options is None)
    fixed = {"depth": 1} if trial["over"] == "width" else {"width": 64}
    seeds, found, base, eps = range(trial["seeds"]), [], None, 1e-8
    for size in trial["sizes"]:
        one = Sized(trial["network"], {**fixed, trial["over"]: size}, base, training)
        if base is None:
            base = one
            if epsilon is not None:
                batch = one.family.batch(0)
                draws = [one.gradient(one.draw(seed), *batch)[1] for seed in seeds]
                eps = epsilon * _mean([root_mean_square(draw) for draw in draws])
        changes = [one.changes(training, eps, seed) for seed in seeds]
        chosen = {
            kind: as_deep(base.progress[base.kinds.get(kind, [LOGITS])[-1]], vertices, one.progress)
            for kind, vertices in one.kinds.items()
        }
        relative = trial["over"] == "depth"
        found.append(
            {
                kind: _mean(
                    [
                        one[vertex][0] / (one[vertex][1] if relative and kind != LOGITS else 1.0)
                        for one in changes
                    ]
                )
                for kind, vertex in chosen.items()
            }
        )
    kinds = [kind for kind in found[0] if all(kind in one for one in found)]
    return {
        "changes": {
            kind: [float(f"{one[kind]:.4g}") for one in found]
            for kind in kinds if all(math.isfinite(one[kind]) for one in found)
        }
    }  # fmt: skip


def as_deep(share: float, vertices: list[Any], progress: dict[Any, float]) -> Any:
    """The last vertex before which about this share of the branches has been added."""
    return min(reversed(vertices), key=lambda one: abs(progress[one] - share))


def _mean(values: list[float]) -> float:
    return math.sqrt(np.mean(np.square(values)))
