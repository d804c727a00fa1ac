"""From a model to its parametrization, in one call: `parametrize`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from archscale_jax._architecture import Architecture, Role
from archscale_jax._errors import unknown as unknown_name
from archscale_jax._frameworks import PureModel, dynamic, pure_model
from archscale_jax._initialize import initialize
from archscale_jax._optax import scale_by_multipliers
from archscale_jax._report import Report, report_of
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._choice import Choice, chosen
from archscale_jax.rules._initialization import weight_standard_deviations
from archscale_jax.rules._matrix import muon_dimension_numbers, optimizer_labels
from archscale_jax.rules._optimizer import OPTIMIZERS, decay_multipliers
from archscale_jax.rules._variances import Deviation
from archscale_jax.rules._width import with_widths
from archscale_jax.tracing.trace import trace_with_starts
from archscale_jax.tracing.values import TraceError


def parametrize(
    model: Any,
    *inputs: PyTree,
    params: PyTree | None = None,
    base: Any = None,
    optimizer: str = "adam",
    depth_exponent: float | None = None,
    initialization: str | None = None,
    width_rule: str | None = "auto",
    depth_rule: str | None = "auto",
    base_inputs: tuple[PyTree, ...] | PyTree | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    roles: Mapping[str, Role | str] | None = None,
    unknown: Literal["error", "warn"] = "error",
) -> "Parametrization":
    """Reads how a model must be initialized and trained, so that a smaller one's rate serves it.

        plan = archscale.parametrize(large, tokens, base=small, optimizer="adamw")
        params = plan.init(jax.random.key(0))
        tx = plan.optimizer(learning_rate=3e-3, weight_decay=0.1)

    The rate that was tuned on `base`, parametrized by the same call without a base, is the rate of
    this model. Nothing is computed or drawn: shapes suffice.

    Args:
      model: a Flax linen or NNX module, an Equinox module, what `haiku.transform` returns, a
        function `apply(params, *inputs)`, or a pair `(apply, params)`. Modules are called as
        `module(*inputs)`, as they are in training: an Equinox module that takes one example gets
        one, batch normalization is switched to training by `model_kwargs`.
      *inputs: trees of arrays or `jax.ShapeDtypeStruct`.
      params: of a function, its params, arrays or shapes. Arrays tell the values before training
        of what is not drawn, and which weights start at 0.
      base: the network on which the rate is tuned: a smaller model of the same kind (a pair
        `(apply, params)` for functions), its `Parametrization`, its `Architecture`, or
        `{width: base width}` of the widths that differ. None: this is the base.
      optimizer: `sgd` (with or without momentum), `adam`, `adamw` or `muon`.
      depth_exponent: α: residual branches shrink by m^(-α) in m times as many; None takes 1/2.
      initialization: initialization rule, see `archscale_jax.initialize`; None takes the one that
        fits the graph.
      width_rule: `auto`, None, or a rule of `archscale_jax.rules.WIDTH_RULES`.
      depth_rule: `auto`, None, `residual` (depth multipliers of residual stacks), or a rule of
        `archscale_jax.rules.LEARNING_RATE_RULES`.
      base_inputs: inputs of the base, a tuple, where they differ.
      model_kwargs: keyword arguments of the call of model and base, such as `{"train": True}`.
      roles: roles of leaves that the function does not tell, by name.
      unknown: see `archscale_jax.trace`.

    Returns:
      The parametrization. Print it: it says what every parameter gets, by which equation, and
      first what could not be known.

    Raises:
      TypeError: a model, base or params of another type.
      ValueError: an unknown optimizer or rule; a base to which a rule does not apply.
      TraceError: a model that cannot be read.
    """
    if optimizer not in OPTIMIZERS:
        hint = "; of any other optimizer take plan.scale() behind it, if it is like one of these"
        raise ValueError(unknown_name("optimizer", optimizer, OPTIMIZERS) + hint)
    options: dict[str, Any] = {"roles": roles, "unknown": unknown}
    keywords = model_kwargs or {}
    pure = pure_model(model, inputs, params, keywords)
    architecture = _traced(pure, inputs, options)
    if base_inputs is not None and type(base_inputs) is not tuple:
        base_inputs = (base_inputs,)
    compared = _base_architecture(
        base,
        architecture,
        optimizer,
        inputs if base_inputs is None else base_inputs,
        keywords,
        options,
    )
    choice = chosen(
        architecture,
        compared,
        OPTIMIZERS[optimizer],
        initialization=initialization,
        width_rule=width_rule,
        depth_rule=depth_rule,
        depth_exponent=depth_exponent,
    )
    return Parametrization(architecture, compared, optimizer, choice, pure)


def _traced(
    pure: PureModel, inputs: tuple[PyTree, ...], options: Mapping[str, Any]
) -> Architecture:
    function, arrays = dynamic(pure.apply, inputs)
    try:
        found = trace_with_starts(function, pure.params, arrays, pure.starts, **options)
    except Exception as error:
        if pure.framework != "function" and not isinstance(error, TraceError):
            error.add_note(
                f"the {pure.framework} model is called as module(*inputs, **model_kwargs) with the "
                "inputs that parametrize got; a module of one example wants one, without a batch"
            )
        raise
    return dataclasses.replace(found, notes=(*pure.notes, *found.notes))


def _base_architecture(
    base: Any,
    architecture: Architecture,
    optimizer: str,
    inputs: tuple[PyTree, ...],
    keywords: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Architecture | None:
    if base is None or isinstance(base, Architecture):
        return base
    if isinstance(base, Parametrization):
        if base.base is not None:
            raise ValueError(
                "base is a parametrization that has a base itself; pass the network on which the "
                "rate was tuned, whose parametrization has none"
            )
        if OPTIMIZERS[base.optimizer_name] != OPTIMIZERS[optimizer]:
            raise ValueError(
                f"base was parametrized for optimizer {base.optimizer_name!r}, this model for "
                f"{optimizer!r}; a rate serves one of them"
            )
        return base.architecture
    if isinstance(base, Mapping) and base and all(isinstance(size, int) for size in base):
        return with_widths(architecture, base)
    if type(base).__name__ == "function":
        raise TypeError(
            "base is a function: pass the pair (apply, params) of the small network, or its "
            "Parametrization"
        )
    try:
        pure = pure_model(base, inputs, None, keywords)
    except TypeError as error:
        error.add_note(
            "raised by base; accepted are a smaller model of the same kind, a pair (apply, params),"
            " a Parametrization, an Architecture, or {width: base width}"
        )
        raise
    return _traced(pure, inputs, options)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Parametrization:
    """How a model is initialized and trained, parameter by parameter.

    An update of a parameter W is -η·(û + λ·W), û what the optimizer makes of the gradient, with
    η and λ the multipliers below times the learning rate and the weight decay of the user.

    Attributes:
      architecture: the graph of the model, with the parameters bound to it.
      base: that of the network on which the rate is tuned; None where this is the base.
      optimizer_name: `sgd`, `adam`, `adamw` or `muon`.
      choice: the rules that were taken, and why.
    """

    architecture: Architecture
    base: Architecture | None
    optimizer_name: str
    choice: Choice
    _model: PureModel

    def __post_init__(self) -> None:
        # What a rule cannot do raises here, where the model and its base are given.
        _ = self._multipliers, self._deviations

    # Initial weights.

    def init(self, key: jax.Array) -> PyTree:
        """Draws the weights, and sets what is not drawn to what the model starts with.

        Pure: works under `jax.jit`, `jax.eval_shape` and `jax.vmap`. Leaves go where the
        shardings of the model's own params say.

        Args:
          key: a JAX random key.

        Returns:
          A tree of the kind that the model's own initialization gives: of linen `{"params": …}`,
          of NNX the state of its `Param`, of Equinox the module with None where nothing is
          trained, of Haiku its params.

        Raises:
          TypeError, ValueError: see `archscale_jax.initialize`.
        """
        names = [
            one.name
            for one in self.architecture.parameters
            if not one.is_drawn and not isinstance(self._model.starts.get(one.name), float)
        ]
        params = self._model.params
        if names and self._model.initial is not None:
            found = self._model.initial(key, names)
            params = map_with_names(lambda name, leaf: found.get(name, leaf), params)
        return initialize(
            key,
            params,
            self.architecture,
            self.choice.initialization,
            rule_options=self.choice.initialization_options,
        )

    @property
    def init_std(self) -> PyTree:
        """Standard deviations, a tree like params; None where nothing is drawn.

        An array that broadcasts over the leaf where the slices of a stack differ.
        """
        return self._of_leaves({**dict.fromkeys(self.architecture.shapes), **self._deviations})

    # Multipliers.

    @property
    def learning_rate(self) -> PyTree:
        """Multipliers of the learning rate, a tree like params of floats."""
        return self._of_leaves(self._multipliers)

    @property
    def weight_decay(self) -> PyTree:
        """Multipliers of the weight decay, a tree like params of floats; 0 for gains and biases.

        They leave the product η·λ of weights, tables and readouts as it is in the base.
        """
        return self._of_leaves(decay_multipliers(self.architecture, self._multipliers))

    @property
    def epsilon(self) -> PyTree:
        """Multipliers of Adam's epsilon, a tree like params: 1, no rule changes it yet."""
        return self._of_leaves(dict.fromkeys(self.architecture.shapes, 1.0))

    def scale(self) -> optax.GradientTransformation:
        """Returns the multipliers of the learning rate as an optax transformation.

        Put it behind the optimizer, `optax.chain(optax.adam(3e-3), plan.scale())`; see
        `archscale_jax.scale_by_architecture` for what that does to decoupled weight decay.
        """
        return scale_by_multipliers(self.architecture, self._multipliers)

    def optimizer(
        self,
        learning_rate: optax.ScalarOrSchedule,
        weight_decay: optax.ScalarOrSchedule = 0.0,
        *,
        momentum: float | None = None,
        nesterov: bool | None = None,
        b1: float | None = None,
        b2: float | None = None,
        eps: float | None = None,
        mu_dtype: Any = None,
        beta: float | None = None,
        ns_steps: int | None = None,
        consistent_rms: float | None = None,
        adam_learning_rate: optax.ScalarOrSchedule | None = None,
    ) -> optax.GradientTransformation:
        """Returns the whole optimizer: the optax one with every multiplier in its place.

        Args:
          learning_rate: that of the base, a number or an optax schedule.
          weight_decay: that of the base, a number or a schedule, decoupled: added to what the
            optimizer makes of the gradient, as `optax.adamw` does. Gains and biases do not decay.
          momentum: of sgd, as in `optax.sgd`.
          nesterov: of all optimizers, as in optax.
          b1: of adam and adamw.
          b2: of adam and adamw.
          eps: of all but sgd.
          mu_dtype: of all but sgd, dtype of the first moments.
          beta: of muon, decay of its momentum.
          ns_steps: of muon, steps of its Newton-Schulz iteration.
          consistent_rms: of muon, the size of the entries of its updates, as in optax. On top of
            the multipliers of the plan, a matrix gets √(inputs of the base's/inputs).
          adam_learning_rate: of muon, the rate in the base of the leaves that Adam has, a number
            or a schedule, which their decay is multiplied with too; None takes `learning_rate`.

        Returns:
          A transformation for trees like params, to be chained with clipping and the like. What is
          None has the default of optax.

        Raises:
          TypeError: an option that the optimizer does not have.
          ValueError: a `consistent_rms` that is not positive.
        """
        given = {
            "momentum": momentum,
            "nesterov": nesterov,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "mu_dtype": mu_dtype,
            "beta": beta,
            "ns_steps": ns_steps,
            "consistent_rms": consistent_rms,
            "adam_learning_rate": adam_learning_rate,
        }
        options = {name: value for name, value in given.items() if value is not None}
        kind = OPTIMIZERS[self.optimizer_name]
        accepted, make = _BARE[kind]
        if others := options.keys() - accepted:
            raise TypeError(
                f"optimizer {self.optimizer_name!r} has no option {sorted(others)}; it has "
                f"{', '.join(accepted)}"
            )
        rate = optax.scale_by_learning_rate(learning_rate)
        if kind == "muon":
            if "adam_learning_rate" in options:
                adams = optax.scale_by_learning_rate(options.pop("adam_learning_rate"))
                rate = optax.partition({"muon": rate, "adam": adams}, self._labels)
            options["plan"] = self
        return optax.chain(
            make(**options), _decay(self.weight_decay, weight_decay), self.scale(), rate
        )

    # The model, and what is said of it.

    def apply(self, params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        """Evaluates the model: outputs alone, of a model with state those with its initial one.

        Args:
          params: as `init` gives them.
          *inputs: of the model.
          key: of random numbers, such as those of dropout, in a linen, Haiku or Equinox model.
            Without it they are the same in every call: pass one in training.
        """
        return self._model.apply(params, *inputs, key=key)

    def report(self) -> Report:
        """Returns one record a parameter, and the table of them that `print` shows."""
        found = report_of(
            self.architecture,
            self.base,
            self.choice.rates,
            self.choice.initialization,
            self.choice.initialization_options,
            self._model.params if self._model.initial is None else None,
            plan=True,
        )
        decay = decay_multipliers(self.architecture, self._multipliers)
        records = [
            {**one, "weight_decay_multiplier": decay[one["path"]], "epsilon_multiplier": 1.0}
            for one in found.records
        ]
        if OPTIMIZERS[self.optimizer_name] == "muon":
            owners = optimizer_labels(self.architecture)
            records = [{**one, "optimizer": owners[one["path"]]} for one in records]
        header = [*self.choice.lines(self.optimizer_name, self.base is not None), *found.header]
        return dataclasses.replace(found, records=records, header=header)

    def __str__(self) -> str:
        return str(self.report())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    # Parts.

    @functools.cached_property
    def _multipliers(self) -> dict[str, float]:
        found = self.choice.rates.multipliers(self.architecture, self.base)
        return {name: one.value for name, one in found.items()}

    @functools.cached_property
    def _deviations(self) -> dict[str, Deviation]:
        return weight_standard_deviations(
            self.architecture,
            self.choice.initialization,
            rule_options=self.choice.initialization_options,
        )

    def _labels(self, params: PyTree) -> PyTree:
        """`muon` or `adam`, of every leaf of a tree like params."""
        owners = optimizer_labels(self.architecture)
        return map_with_names(lambda name, leaf: owners[name][:4], params)

    def _of_leaves(self, values: Mapping[str, Any]) -> PyTree:
        return map_with_names(lambda name, leaf: values[name], self._model.params)


def _sgd(momentum: float | None = None, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


def _muon(
    plan: Parametrization, consistent_rms: float | None = None, **options: Any
) -> optax.GradientTransformation:
    from optax.contrib import muon

    if isinstance(consistent_rms, int | float) and not consistent_rms > 0:
        raise ValueError(f"consistent_rms is {consistent_rms}; accepted are numbers above 0")
    options["muon_weight_dimension_numbers"] = functools.partial(
        muon_dimension_numbers, plan.architecture
    )
    # The rate follows behind the multipliers, with the sign.
    bare = optax.chain(muon(1.0, consistent_rms=consistent_rms, **options), optax.scale(-1.0))
    rates = plan.choice.rates
    if consistent_rms is None or rates.width_rule != "muon":
        return bare
    # The plan's multipliers are those of the default scaling, and so stands the decay behind; what
    # is to be added does not depend on the number, which may be a traced one.
    both = [
        one.multipliers(plan.architecture, plan.base)
        for one in (rates, dataclasses.replace(rates, consistent_rms=1.0))
    ]
    added = {name: both[1][name].value / both[0][name].value for name in both[0]}
    return optax.chain(bare, scale_by_multipliers(plan.architecture, added))


_BARE: dict[str, tuple[tuple[str, ...], Callable[..., optax.GradientTransformation]]] = {
    "sgd": (("momentum", "nesterov"), _sgd),
    "adam": (("b1", "b2", "eps", "nesterov", "mu_dtype"), optax.scale_by_adam),
    "muon": (
        ("beta", "ns_steps", "consistent_rms", "adam_learning_rate", "eps", "nesterov", "mu_dtype"),
        _muon,
    ),
}
"""Optimizers without rate and decay by kind, and their options."""


def _decay(
    multipliers: PyTree, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Adds λ_p · weight_decay · W to every update."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    by_name = named_leaves(multipliers)

    def init(params: PyTree) -> optax.ScaleByScheduleState | optax.EmptyState:
        del params
        if callable(weight_decay):
            return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        if params is None:
            raise ValueError("weight decay needs params: call update(gradients, state, params)")
        now: Any = weight_decay
        if callable(weight_decay):
            now = weight_decay(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        weights = named_leaves(params)

        def decayed(name: str, update: jax.Array) -> jax.Array:
            if not by_name[name]:
                return update
            return update + (by_name[name] * now * weights[name]).astype(update.dtype)

        return map_with_names(decayed, updates), state

    return optax.GradientTransformation(init, update)
