"""From a model to its parametrization, in one call: `parametrize`."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import optax

from archscale_jax._architecture import Architecture, Role
from archscale_jax._errors import unknown as unknown_name
from archscale_jax._frameworks import PureModel, dynamic, pure_model
from archscale_jax._initialize import initialize
from archscale_jax._multiplied import multiplied_apply
from archscale_jax._optax import scale_by_multipliers
from archscale_jax._optimizers import MuonParts, optimizer_of
from archscale_jax._placement import sharding_of
from archscale_jax._report import BaseValues, PlanNumbers, Report, report_of
from archscale_jax._trees import PyTree, map_with_names, named_leaves, scaled_leaves, with_leaves
from archscale_jax.rules._choice import Choice, chosen
from archscale_jax.rules._forward import Form, start_factors
from archscale_jax.rules._initialization import weight_standard_deviations
from archscale_jax.rules._matrix import muon_dimension_numbers, optimizer_labels
from archscale_jax.rules._optimizer import (
    OPTIMIZERS,
    UNSUPPORTED,
    Duration,
    Hyperparameters,
    hyperparameters,
    optimizer_lines,
)
from archscale_jax.rules._registry import Explained, Part
from archscale_jax.rules._tables import with_rows
from archscale_jax.rules._variances import Deviation
from archscale_jax.rules._width import with_widths
from archscale_jax.rules._zeros import with_zeros, zero_leaves
from archscale_jax.tracing.trace import trace_with_starts
from archscale_jax.tracing.values import TraceError
from archscale_jax.tuning._measured import (
    BATCH_NOTE,
    Measurable,
    examples_interact,
    matched_multipliers,
)


def parametrize(
    model: Any,
    *inputs: PyTree,
    params: PyTree | None = None,
    base: Any = None,
    optimizer: str = "adam",
    depth_exponent: float | None = None,
    batch_ratio: float = 1.0,
    token_ratio: float = 1.0,
    form: Form = "auto",
    attention_scale: Literal["1/d"] | None = None,
    epsilon_rule: Literal["completep", "gradient"] = "completep",
    initialization: str | None = None,
    branch_share: float | None = None,
    zero_init: Collection[str] = (),
    width_rule: str | None = "auto",
    depth_rule: str | None = "auto",
    base_inputs: tuple[PyTree, ...] | PyTree | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    learning_rate: Literal["rules", "measured"] = "rules",
    loss_fn: Callable[[Any], jax.Array] | None = None,
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
      optimizer: `sgd` (with or without momentum), `adam`, `adamw`, `lion` or `muon`.
      depth_exponent: α: residual branches shrink by m^(-α) in m times as many. None reads it from
        the graph: 1 where branches have two layers or more, 1/2 where they have one (theory §11).
      batch_ratio: batch size over the base's, of adam and adamw; see `rules._optimizer.Duration`.
      token_ratio: examples of the whole training over the base's.
      form: `auto`: no forward multipliers but of tied tables, whose logits `plan.apply` scales;
        `folded`: none at all, tied tables follow the readout; `multipliers`: branches and readouts
        have them too, as published. With forward multipliers, train through `plan.apply`.
      attention_scale: `1/d` makes `plan.apply` multiply queries and keys by 1/d_head, beyond the
        base's size, as [μP] does where d_head grows; None leaves the model's own scale.
      epsilon_rule: `completep`, as published, or `gradient`: as gradients scale, leaf by leaf; they
        differ outside of residual branches.
      initialization: initialization rule, see `archscale_jax.initialize`; None takes the one that
        fits the graph.
      branch_share: what all residual branches of the base add to the second moment of their stream,
        over its own; None takes 2 where branches normalize what they read, and 0.25 elsewhere. A
        smaller one makes a shallow base more like a deep network.
      zero_init: what starts at zero: `branch_ends`, `readout`, `queries`, or several of them.
      width_rule: `auto`, None, or a rule of `archscale_jax.rules.WIDTH_RULES`.
      depth_rule: `auto`, None, `residual` (depth multipliers of residual stacks), or a rule of
        `archscale_jax.rules.LEARNING_RATE_RULES`.
      base_inputs: inputs of the base, a tuple, where they differ.
      model_kwargs: keyword arguments of the call of model and base, such as `{"train": True}`.
      learning_rate: `rules`, or `measured`: the rates of stem, hidden layers and readout are
        multiplied further so that the first update of each does what it does in the base, measured
        on `inputs`, which are arrays then (theory §14). It helps MLPs and CNNs over depth,
        topology, width and activation, and misleads batch normalization without skips.
      loss_fn: of `measured`, the outputs to the loss.
      roles: roles of leaves that the function does not tell, by name; those of leaves that the base
        has too are taken there.
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
        if optimizer in UNSUPPORTED:
            hint = f"; no rule for it is known here: {UNSUPPORTED[optimizer]}"
        raise ValueError(unknown_name("optimizer", optimizer, OPTIMIZERS) + hint)
    duration = Duration(batch_ratio, token_ratio)
    duration.check(optimizer)
    options: dict[str, Any] = {"roles": roles, "unknown": unknown}
    keywords = model_kwargs or {}
    pure = pure_model(model, inputs, params, keywords)
    architecture = _traced(pure, inputs, options)
    zeros = zero_leaves(architecture, zero_init)
    architecture = with_zeros(architecture, zeros)
    if base_inputs is not None and type(base_inputs) is not tuple:
        base_inputs = (base_inputs,)
    of_base = inputs if base_inputs is None else base_inputs
    compared = _base_architecture(base, architecture, optimizer, of_base, keywords, options)
    if compared is not None and width_rule is not None:
        architecture = with_rows(architecture, compared, folded=form == "folded")
    choice = chosen(
        architecture,
        compared,
        OPTIMIZERS[optimizer],
        initialization=initialization,
        branch_share=branch_share,
        width_rule=width_rule,
        depth_rule=depth_rule,
        depth_exponent=depth_exponent,
        form=form,
        attention_scale=attention_scale,
        epsilon_rule=epsilon_rule,
    )
    plan = Parametrization(
        architecture, compared, optimizer, choice, duration, zeros, pure, _inputs=_shapes(inputs)
    )
    if learning_rate == "rules" and loss_fn is None:
        return plan
    if learning_rate not in ("rules", "measured"):
        raise ValueError(unknown_name("learning_rate", learning_rate, ("rules", "measured")))
    if learning_rate == "rules" or loss_fn is None:
        raise ValueError(
            "learning_rate='measured' and loss_fn belong together: loss_fn takes the outputs of "
            "the model, as lambda logits: cross_entropy(logits, labels)"
        )
    options["branch_share"] = branch_share
    return _measured(plan, base, (inputs, of_base), loss_fn, keywords, options)


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
    leaves = named_leaves(pure.params)  # those that it lacks, as of more layers, are not asked for
    roles = {name: role for name, role in (options["roles"] or {}).items() if name in leaves}
    return _traced(pure, inputs, {**options, "roles": roles})


def _measured(
    plan: "Parametrization",
    base: Any,
    inputs: tuple[tuple[PyTree, ...], tuple[PyTree, ...]],
    loss_fn: Callable[[Any], jax.Array],
    keywords: Mapping[str, Any],
    options: Mapping[str, Any],
) -> "Parametrization":
    """The plan with its rates matched to what the base's updates do."""
    if base is None:
        return plan
    if isinstance(base, Architecture | Mapping):
        raise TypeError(
            "learning_rate='measured' trains the base for one update: pass it as a model, a pair "
            f"(apply, params) or its Parametrization, found {type(base).__name__}"
        )
    if shapes := [one for one in jax.tree.leaves(inputs) if isinstance(one, jax.ShapeDtypeStruct)]:
        raise ValueError(
            f"learning_rate='measured' needs a batch: inputs hold the shape {shapes[0].shape}, "
            "pass arrays"
        )
    if not isinstance(base, Parametrization):
        base = parametrize(
            base,
            *inputs[1],
            optimizer=plan.optimizer_name,
            depth_exponent=plan.choice.rates.depth_exponent,
            initialization=plan.choice.initialization,
            model_kwargs=keywords,
            **options,
        )
    network, small = (
        Measurable(one.apply, one.architecture, one.init, one.optimizer(1.0), given)
        for one, given in zip((plan, base), inputs, strict=True)
    )
    found = matched_multipliers(network, small, loss_fn, cap_readout=plan.optimizer_name == "sgd")
    if examples_interact(network):
        notes = (*plan.architecture.notes, BATCH_NOTE)
        architecture = dataclasses.replace(plan.architecture, notes=notes)
        plan = dataclasses.replace(plan, architecture=architecture)
    return dataclasses.replace(plan, measured=found)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Parametrization:
    """How a model is initialized and trained, parameter by parameter.

    An update of a parameter W is -η·(û + λ·W), û what the optimizer makes of the gradient, with
    η and λ the multipliers below times the learning rate and the weight decay of the user.

    Attributes:
      architecture: the graph of the model, with the parameters bound to it.
      base: that of the network on which the rate is tuned; None where this is the base.
      optimizer_name: `sgd`, `adam`, `adamw`, `lion` or `muon`.
      choice: the rules that were taken, and why.
      duration: batch and tokens over those of the base.
      zeros: names of the leaves that start at zero because the user asks for it.
      measured: what rates are multiplied by further, by name, where they were measured.
    """

    architecture: Architecture
    base: Architecture | None
    optimizer_name: str
    choice: Choice
    duration: Duration
    zeros: frozenset[str]
    _model: PureModel
    measured: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    _inputs: tuple[PyTree, ...] = ()

    def __post_init__(self) -> None:
        # What a rule cannot do raises here, where the model and its base are given.
        _ = self._hyperparameters, self._deviations

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
            if not (one.is_drawn and one.trained)
            and not isinstance(self._model.starts.get(one.name), float)
            and one.name not in self.zeros
        ]
        params = self._model.params
        if names and self._model.initial is not None:
            found = self._model.initial(key, names)
            params = with_leaves(params, found)
        if self.zeros:  # shapes, as arrays would be kept
            params = map_with_names(self._zeroed, params)
        drawn = initialize(
            key,
            params,
            self.architecture,
            self.choice.initialization,
            rule_options=self.choice.initialization_options,
        )
        return scaled_leaves(drawn, {name: one.value for name, one in self._starts.items()})

    def _zeroed(self, name: str, leaf: Any) -> Any:
        if name not in self.zeros:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf, False))

    @property
    def init_std(self) -> PyTree:
        """Standard deviations, a tree like params; None where nothing is drawn.

        An array that broadcasts over the leaf where the slices of a stack differ.
        """
        leaves, drawn_by_model = named_leaves(self._model.params), self._model.initial is not None
        kept = {
            one.name
            for one in self.architecture.parameters
            if not one.trained
            and (drawn_by_model or not isinstance(leaves[one.name], jax.ShapeDtypeStruct))
        }
        found = {
            name: one * self._starts[name].value if name in self._starts else one
            for name, one in self._deviations.items()
            if name not in kept
        }
        return self._of_leaves({**dict.fromkeys(self.architecture.shapes), **found})

    # Multipliers.

    @property
    def learning_rate(self) -> PyTree:
        """Multipliers of the learning rate, a tree like params of floats."""
        return self._of_leaves(_values(self._hyperparameters.rates))

    @property
    def weight_decay(self) -> PyTree:
        """Multipliers of the weight decay, a tree like params of floats; 0 for gains and biases.

        They leave the product η·λ of weights as it is in the base, but for m_L^(α-1) in residual
        branches (theory §12).
        """
        return self._of_leaves(_values(self._hyperparameters.decay))

    @property
    def epsilon(self) -> PyTree:
        """Multipliers of Adam's epsilon, a tree like params of floats (theory §12)."""
        return self._of_leaves(_values(self._hyperparameters.epsilon))

    def scale(self) -> optax.GradientTransformation:
        """Returns the multipliers of the learning rate as an optax transformation.

        Put it behind the optimizer, `optax.chain(optax.adam(3e-3), plan.scale())`; see
        `archscale_jax.scale_by_architecture` for what that does to decoupled weight decay.
        """
        return scale_by_multipliers(self.architecture, _values(self._hyperparameters.rates))

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
          b1: of adam, adamw and lion, that of the base.
          b2: of adam, adamw and lion, that of the base.
          eps: of adam, adamw and muon, that of the base.
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
          ValueError: a rate or decay that is negative or not finite; a `consistent_rms` that is
            not positive.
        """
        options = {
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
        rates, decay, epsilon = map(_values, self._hyperparameters)
        return optimizer_of(
            self.optimizer_name,
            self.architecture,
            learning_rate,
            weight_decay,
            options,
            rates=rates,
            decay=decay,
            epsilon=epsilon,
            duration=self.duration,
            muon=MuonParts(
                functools.partial(muon_dimension_numbers, self.architecture),
                self._labels,
                self._rms_multipliers,
            ),
        )

    # The model, and what is said of it.

    def apply(self, params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        """Evaluates the model: outputs alone, of a model with state those with its initial one.

        Where the parametrization has forward multipliers they are applied here, and only here: the
        loss is that of `plan.apply` then, as the report says first.

        Args:
          params: as `init` gives them.
          *inputs: of the model.
          key: of random numbers, such as those of dropout, in a linen, Haiku or Equinox model.
            Without it they are the same in every call: pass one in training.

        Raises:
          TraceError: logits, or products of queries and keys, that are to be multiplied lie in a
            function with a derivative of its own, or in this call are not what they were.
        """
        forward = self.choice.forward
        params = scaled_leaves(params, forward.leaves)
        if not forward.in_products:
            return self._model.apply(params, *inputs, key=key)
        return self._multiplied(params, inputs, key)

    def report(
        self,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Report:
        """Returns one record a parameter, and the table of them that `print` shows.

        Args:
          learning_rate: the base's, of a schedule its peak. With it the table shows what every
            parameter gets, η, λ and ε, and the timescale 1/(η·λ) of its decay in updates, instead
            of multipliers; the records have both.
          weight_decay: the base's.
          eps: the base's.
        """
        base_values = None
        if learning_rate is not None:
            base_values = BaseValues(learning_rate, weight_decay, eps)
        found = report_of(
            self.architecture,
            self.base,
            self.choice.rates,
            self.choice.initialization,
            self.choice.initialization_options,
            self._model.params if self._model.initial is None else None,
            plan=PlanNumbers(self._hyperparameters, self._starts, self.choice.forward, base_values),
        )
        if OPTIMIZERS[self.optimizer_name] == "muon":
            owners = optimizer_labels(self.architecture)
            records = [{**one, "optimizer": owners[one["path"]]} for one in found.records]
            found = dataclasses.replace(found, records=records)
        header = [*self.choice.lines(self.optimizer_name, self.base is not None), *found.header]
        if self.base is not None:
            header += optimizer_lines(OPTIMIZERS[self.optimizer_name], self.choice.epsilon_rule)
        if self.duration.kappa != 1:
            header.insert(1, self.duration.line())
        return dataclasses.replace(found, header=header)

    def __str__(self) -> str:
        return str(self.report())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    # Parts.

    @functools.cached_property
    def _hyperparameters(self) -> Hyperparameters:
        choice = self.choice
        rates = choice.rates.multipliers(self.architecture, self.base)
        for name, part in self.measured.items():
            rates[name] = Explained(rates[name].value * part.value, (*rates[name].parts, part))
        return hyperparameters(
            self.architecture,
            self.base,
            OPTIMIZERS[self.optimizer_name],
            rates,
            choice.forward,
            self.duration,
            width=choice.rates.width_rule is not None,
            depth_exponent=choice.rates.depth_exponent if choice.rates.depth_rule else None,
            epsilon_rule=choice.epsilon_rule,
        )

    def _rms_multipliers(self) -> dict[str, float]:
        rates = self.choice.rates
        if rates.width_rule != "muon":
            return dict.fromkeys(self.architecture.shapes, 1.0)
        # It does not depend on the number, which may be a traced one.
        default, consistent = (
            one.multipliers(self.architecture, self.base)
            for one in (rates, dataclasses.replace(rates, consistent_rms=1.0))
        )
        return {name: consistent[name].value / default[name].value for name in default}

    @functools.cached_property
    def _starts(self) -> dict[str, Part]:
        return start_factors(self.architecture, self.choice.forward)

    @functools.cached_property
    def _multiplied(self) -> Callable[..., Any]:
        return multiplied_apply(self._model.apply, self.choice.forward)

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


def _shapes(inputs: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Shapes of what are arrays, and the rest as it is."""

    def shape(leaf: Any) -> Any:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape, inputs)


def _values(found: Mapping[str, Explained]) -> dict[str, float]:
    return {name: one.value for name, one in found.items()}
