"""The audit: whether a training is set up as its plan promises, asked of the set-up itself."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from archscale_jax._architecture import Architecture, Role, check_parameters
from archscale_jax._auditing import chain as chains
from archscale_jax._auditing import loss as losses
from archscale_jax._auditing import starts as weights
from archscale_jax._auditing.clipping import clipped
from archscale_jax._auditing.features import Features, checked_inputs, features_of
from archscale_jax._auditing.figure import Row, rows_of, svg_of
from archscale_jax._auditing.findings import Finding, grouped, html_of, text_of
from archscale_jax._auditing.guess import guesses
from archscale_jax._auditing.kinds import Kind
from archscale_jax._auditing.probe import Answers, Chain, Probes, ask, compiled, matrix_probe
from archscale_jax._auditing.promises import Promises
from archscale_jax._auditing.step import Step, checked_epsilon, even_of, sizes_of, step_of
from archscale_jax._parametrize import Parametrization
from archscale_jax._reporting.names import count_text, merged_names
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.rules._matrix import Matrix, matrix_of
from archscale_jax.tracing.trace import trace
from archscale_jax.tracing.values import TraceError

LARGE_WIDTH, LARGE_SIZE = 256, 10**6
"""Inputs of a hidden layer, and parameters, from which a plan without a base is asked about."""


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What `audit` found. Printed it is text; notebooks show a table and a figure.

    Attributes:
      findings: what is not as the plan promises, one for each parameter; empty where all is well.
      records: one dictionary per parameter; a data frame reads it. Keys:
        path, role, shape: see `Parameter`;
        kind: what its updates are;
        learning_rate, weight_decay, epsilon: multipliers that were measured, of the decay η·λ over
          the base's, each up to one constant; None where they do not show;
        learning_rate_promised, weight_decay_promised, epsilon_promised: those of the plan;
        drawn: whether the plan draws it;
        deviation: standard deviation over the plan's, of what is drawn; else the root mean square;
        gradient: root mean square of its gradient on the batch;
        relative_update: root mean square of the first update over that of the leaf, inf of zeros.
      features: second moments of the vertices on the batch, those promised for inputs of second
        moment 1, and the relative change in the first update; empty where the loss cannot be read.
      notes: what was not judged, and why.
      seconds: how long it took.
    """

    findings: list[Finding]
    records: list[dict[str, Any]]
    features: Features
    notes: list[str]
    seconds: float = 0.0

    def assert_ok(self, accept: Collection[str] = ()) -> None:
        """Raises AssertionError with the text of the audit where there are findings.

        Args:
          accept: kinds of findings that are meant so, as `frozen` or `schedule`.
        """
        rest = [one for one in self.findings if one.kind not in accept]
        if rest:
            raise AssertionError(str(dataclasses.replace(self, findings=rest)))

    def __str__(self) -> str:
        return text_of(self.findings, self.notes, self._header())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_of(self.findings, self.notes, self._header()) + svg_of(self.rows())

    def rows(self) -> list[Row]:
        """Returns measured over promised, a row a leaf, as the figure shows them."""
        return rows_of(self.records, self.findings)

    def _header(self) -> str:
        kinds = len(grouped(self.findings))
        count = f"{kinds} finding{'s' * (kinds != 1)}" if kinds else "no findings"
        # Without a plan "no findings" is no approval of rates, decay and weights.
        planless = any("looks_like" in one for one in self.records)
        return f"audit of {len(self.records)} parameters{', without a plan' * planless}: {count}"


def audit(
    plan: Parametrization | None,
    optimizer: Any,
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Any,
    *,
    tuned_here: bool = False,
) -> Audit:
    """Asks a training set-up whether it does what its plan promises, before it is run.

        archscale.audit(plan, tx, loss_fn, params, batch).assert_ok()

    The optimizer is opaque, so it is fed: gradients of 0 show the decay of every leaf, gradients of
    several sizes which optimizer it has, its rate and its epsilon, pairs of directions whether and
    along which axes its updates are made orthogonal, larger params whether updates are relative to
    them, further calls schedules and accumulation. The loss is read and evaluated. Base values are
    not known, so that multipliers are compared between leaves. Masks, partitions, clipping,
    schedules, `optax.MultiSteps`, `optax.inject_hyperparams` and shardings are those of the chain.

    Costs about twenty updates of the optimizer, a few evaluations of the gradient, and compiling
    these. Params, gradients and state are those of one training step, once more.

    Args:
      plan: what the set-up is compared with. With None the findings are faults whatever the plan,
        and the notes say which parametrization it looks like, the records leaf by leaf.
      optimizer: the whole optax transformation, as it is trained with.
      loss_fn: `(params, batch)` to the scalar loss, or to a tuple that starts with it.
      params: the initial params, arrays.
      batch: what `loss_fn` reads: a tree of arrays.
      tuned_here: whether the learning rate was tuned on this network itself, so that a plan of a
        large network without a base is meant so.

    Returns:
      The audit.

    Raises:
      TypeError: a plan, an optimizer or a loss of another type, or params that are not arrays.
      TraceError: without a plan, a loss that cannot be read.
      ValueError: params that are not those of the plan.
    """
    if not (plan is None or isinstance(plan, Parametrization)):
        raise TypeError(
            "plan must be what archscale_jax.parametrize returns, or None, found "
            f"{type(plan).__name__}"
        )
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function of params and batch to the loss, found "
            f"{type(loss_fn).__name__}; the order is plan, optimizer, loss_fn, params, batch"
        )
    begun = time.perf_counter()
    arrays, whole = _arrays(params)
    given, batched = _arrays(batch)
    if plan is None:
        loss = losses.scalar(lambda params, batch: loss_fn(whole(params), batched(batch)))
        return _guessed(optimizer, loss, arrays, given)
    check_parameters(plan.architecture, arrays, masked=(type(None),))
    findings = [*([] if tuned_here else _without_base(plan)), *weights.dtypes(arrays)]
    found = _Found(arrays, lambda params, batch: loss_fn(whole(params), batched(batch)), given)
    if not any(one.kind == "dtype" for one in findings):
        found = _found(plan, optimizer, found)
    return Audit(
        [*findings, *found.findings],
        _records(plan, found),
        found.features,
        list(found.notes),
        time.perf_counter() - begun,
    )


def _guessed(
    optimizer: Any, loss: Callable[[PyTree, Any], Any], params: PyTree, batch: Any
) -> Audit:
    """What a set-up without a plan looks like, and what is wrong whatever the plan."""
    begun, leaves = time.perf_counter(), named_leaves(params)
    architecture = trace(loss, params, batch)
    gradient = losses.gradient_of(loss, params, batch)
    chain = compiled(optimizer, params, params, gradient.loss)
    probes = Probes(params, _matrices(architecture, params))
    answers = ask(chain, probes)
    sizes = {name: leaf.dtype.itemsize for name, leaf in leaves.items()}
    found, whole = guesses(architecture, answers, sizes, sizes_of(params))
    findings = [
        *losses.checked_gradient(architecture, loss, params, batch, gradient),
        *chains.movements(answers),
    ]
    if gradient.is_finite:
        kinds = {name: one.kind for name, one in found.items()}
        findings += _small_or_clipped(chain, probes, answers, kinds, gradient)
        findings += losses.doubled(loss, params, batch, gradient.loss)
    records = [
        {
            "path": one.name,
            "role": str(one.role),
            "shape": one.shape,
            "kind": str(found[one.name].kind),
            "learning_rate": found[one.name].rate,
            "drawn_by_fan_in": found[one.name].drawn,
            "looks_like": found[one.name].looks_like,
        }
        for one in architecture.parameters
        if one.name in found
    ]
    compared = "rates, decay and initial weights were compared with nothing: there is no plan"
    alike: dict[str, list[str]] = {}
    for one in records:
        alike.setdefault(one["looks_like"], []).append(one["path"])
    leaf_by_leaf = (f"{', '.join(merged_names(paths))}: {look}" for look, paths in alike.items())
    notes = [*whole, compared, *leaf_by_leaf]
    return Audit(findings, records, Features({}, {}, {}), notes, time.perf_counter() - begun)


class _Found(NamedTuple):
    """What is asked, and what is known of it."""

    params: PyTree
    loss: Callable[[PyTree, Any], Any]
    batch: Any
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    starts: Mapping[str, weights.Start] = {}
    gradient: losses.Gradient | None = None
    leaves: Mapping[str, chains.Leaf] = {}
    step: Step | None = None
    period: int = 1
    features: Features = Features({}, {}, {})


def _found(plan: Parametrization, optimizer: Any, asked: _Found) -> _Found:
    """Asks and compares, part by part."""
    params, batch = asked.params, asked.batch
    loss = losses.scalar(asked.loss)
    starts = weights.measured(plan, params)
    gradient = losses.gradient_of(loss, params, batch)
    findings = [
        *weights.mixed_dtypes(plan, params),
        *weights.checked(plan, params, starts),
        *losses.checked_gradient(plan.architecture, loss, params, batch, gradient),
    ]
    found = asked._replace(findings=findings, starts=starts, gradient=gradient)
    found = _with_chain(plan, optimizer, found, gradient)
    return _with_loss(plan, loss, found, gradient) if gradient.is_finite else found


def _with_chain(
    plan: Parametrization, optimizer: Any, found: _Found, gradient: losses.Gradient
) -> _Found:
    """Asks the optimizer, with probes and with the gradient of the batch."""
    params, leaves = found.params, named_leaves(found.params)
    chain = compiled(optimizer, params, params, gradient.loss)
    if any(leaf.dtype == jnp.float16 for leaf in leaves.values()):
        return found._replace(notes=["the optimizer was not asked: float16 does not hold probes"])
    probes = Probes(params, _matrices(plan.architecture, params))
    answers = ask(chain, probes)
    sizes = {name: leaf.dtype.itemsize for name, leaf in leaves.items()}
    checked = chains.checked(answers, Promises.of(plan), sizes)
    findings, step = [*found.findings, *checked.findings], None
    if answers.first and gradient.is_finite:
        kinds = {name: one.kind for name, one in checked.leaves.items()}
        findings += _small_or_clipped(chain, probes, answers, kinds, gradient)
        step = step_of(chain, answers, gradient, params)
    return found._replace(
        findings=findings,
        notes=checked.notes,
        leaves=checked.leaves,
        step=step,
        period=answers.period,
    )


def _small_or_clipped(
    chain: Chain,
    probes: Probes,
    answers: Answers,
    kinds: Mapping[str, Kind],
    gradient: losses.Gradient,
) -> list[Finding]:
    """Findings on what the size of the batch's gradient does to the updates."""
    if not answers.first:
        return []
    small: list[Finding] = []
    if Kind.ADAM in kinds.values():
        even = even_of(chain, probes, answers, gradient)
        small = list(checked_epsilon(even, answers, kinds, gradient))
    # Where epsilon exceeds gradients, updates under Adam do not show clipping.
    return small or clipped(chain, probes, answers, kinds, gradient.norm)


def _with_loss(
    plan: Parametrization,
    loss: Callable[[PyTree, Any], Any],
    found: _Found,
    gradient: losses.Gradient,
) -> _Found:
    """Reads and evaluates the loss."""
    params, batch = found.params, found.batch
    summed = losses.doubled(loss, params, batch, gradient.loss)
    findings = [*found.findings, *summed]
    if not summed:
        findings += losses.multiplied(plan, loss, params, batch, found.period)
    notes, features = [*found.notes], found.features
    try:
        findings += losses.checked_multipliers(plan, loss, params, batch)
        features = features_of(plan, loss, params, batch, found.step and found.step.updates)
    except (TraceError, TypeError, ValueError) as error:  # of what the loss calls, too
        notes.append(f"features were not looked at, as the loss cannot be read: {error}")
    if not any(one.kind == "start" for one in findings):
        findings += checked_inputs(features)
    return found._replace(findings=findings, notes=notes, features=features)


def _arrays(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns the arrays of a tree, and a function that puts the other leaves back."""
    is_array = lambda leaf: hasattr(leaf, "dtype") and hasattr(leaf, "shape")  # noqa: E731
    leaves, tree = jax.tree.flatten(params)
    for leaf in leaves:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params and batch are arrays, found the shape {leaf.shape}; pass params as "
                "plan.init gives them"
            )
    if all(map(is_array, leaves)):
        return params, lambda arrays: arrays
    arrays = jax.tree.unflatten(tree, [one if is_array(one) else None for one in leaves])

    def whole(arrays: PyTree) -> PyTree:
        given = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(tree, [next(given) if is_array(one) else one for one in leaves])

    return arrays, whole


def _matrices(architecture: Architecture, params: PyTree) -> dict[str, Matrix]:
    """The axes of the probe of every leaf."""
    found = {}
    for one in architecture.parameters:
        matrix = matrix_of(one)
        found[one.name] = matrix_probe(one.shape, matrix if isinstance(matrix, Matrix) else None)
    return {name: found[name] for name in named_leaves(params)}


def _without_base(plan: Parametrization) -> Iterator[Finding]:
    """Findings on the leaves of a large plan that a base would change."""
    if plan.base is not None:
        return
    parameters = plan.architecture.parameters
    readers = [one for one in parameters if one.role in (Role.HIDDEN, Role.READOUT)]
    widths = [one.fan_in // one.kernel_positions for one in readers]
    size = sum(math.prod(one.shape) for one in parameters)
    if max(widths, default=0) < LARGE_WIDTH and size < LARGE_SIZE:
        return
    for one in readers:
        yield Finding(
            "base",
            one.name,
            f"no base: every multiplier is 1 in a network of {count_text(size)} parameters, up to "
            f"{max(widths, default=0)} wide",
            "multipliers relative to the network on which the rate was tuned",
            "a rate that was tuned on a smaller network is not this one's: the set-up is the "
            "standard parametrization",
            "parametrize(…, base=the small network); tuned_here=True says that the rate was tuned "
            "on this one",
        )


def _records(plan: Parametrization, found: _Found) -> list[dict[str, Any]]:
    promises, names = Promises.of(plan), named_leaves(found.params)
    records = []
    for one in plan.architecture.parameters:
        name = one.name
        if name not in names:
            continue
        leaf, start, step = found.leaves.get(name), found.starts.get(name), found.step
        records.append(
            {
                "path": name,
                "role": str(one.role),
                "shape": one.shape,
                "kind": str(leaf.kind) if leaf else None,
                "learning_rate": leaf.rate if leaf else None,
                "learning_rate_promised": promises.rates[name],
                "weight_decay": leaf.decay if leaf else None,
                "weight_decay_promised": promises.decay[name],
                "epsilon": leaf.epsilon if leaf else None,
                "epsilon_promised": promises.epsilon[name],
                "drawn": name in plan._deviations,
                "deviation": start.deviation if start else None,
                "gradient": found.gradient.sizes[name] if found.gradient else None,
                "relative_update": step.relative[name] if step else None,
            }
        )
    return records
