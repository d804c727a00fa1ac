"""Faults of training set-ups, each after a public complaint or a case of ours, and right set-ups.

A fault is a function of a network and an optimizer to a set-up and the names of the leaves that are
wrong; None where it cannot be made, as a tied table in a network without one, or makes no
difference, as multipliers that are all 1.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

import archscale_jax as archscale
from archscale_jax._auditing.findings import ALL
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._matrix import Matrix, matrix_of
from tests.audit_networks import KEY, SLOW, WIDTH, Setup, loss_of, network, plan_of, setup

RATE, DECAY = 1e-2, 0.1
Faulty = tuple[Setup, set[str]] | None
EVERY = {ALL}


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
      source: the public thread, or our own case.
      kinds: of the findings that name it.
      make: `(network, optimizer)` to a set-up and what is wrong.
    """

    source: str
    kinds: tuple[str, ...]
    make: Callable[[str, str], Faulty]


FAULTS: dict[str, Fault] = {}
OWN = "own case"


def fault(source: str, *kinds: str) -> Callable[[Callable[[str, str], Faulty]], Any]:
    def register(make: Callable[[str, str], Faulty]) -> Callable[[str, str], Faulty]:
        FAULTS[make.__name__] = Fault(source, kinds, make)
        return make

    return register


# What a plan says, by name.


def rates(one: Setup) -> dict[str, float]:
    return named_leaves(one.plan.learning_rate)


def decays(one: Setup) -> dict[str, float]:
    return named_leaves(one.plan.weight_decay)


def roles(one: Setup) -> dict[str, str]:
    return {each.name: str(each.role) for each in one.plan.architecture.parameters}


def matrices(one: Setup) -> dict[str, Matrix]:
    found = {each.name: matrix_of(each) for each in one.plan.architecture.parameters}
    return {name: each for name, each in found.items() if isinstance(each, Matrix)}


def those(one: Setup, *wanted: str) -> list[str]:
    return [name for name, role in roles(one).items() if role in wanted]


def other_than(values: Mapping[str, float], one: float = 1.0) -> set[str]:
    return {name for name, value in values.items() if abs(math.log(value / one)) > 0.1}


# Chains.


def bare(one: Setup) -> optax.GradientTransformation:
    """The optimizer without multipliers, rate and sign."""
    if one.plan.optimizer_name == "sgd":
        return optax.trace(**_sgd())
    if one.plan.optimizer_name == "adamw":
        return optax.scale_by_adam()
    numbers = functools.partial(archscale.muon_dimension_numbers, one.plan.architecture)
    return optax.chain(muon(1.0, muon_weight_dimension_numbers=numbers), optax.scale(-1.0))


def _sgd() -> dict[str, Any]:
    return {"decay": SLOW["sgd"]["momentum"]}


def by_leaf(values: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: map_with_names(lambda name, u: values[name] * u, updates)
    )


def decaying(values: Mapping[str, float]) -> optax.GradientTransformation:
    def decayed(updates: PyTree, params: PyTree) -> PyTree:
        weights = named_leaves(params)
        return map_with_names(lambda name, u: u + DECAY * values[name] * weights[name], updates)

    return optax.stateless(decayed)


def chained(
    one: Setup, multipliers: Mapping[str, float], decay: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """The plan's chain with other multipliers."""
    return optax.chain(
        bare(one),
        decaying(decays(one) if decay is None else decay),
        by_leaf(multipliers),
        optax.scale_by_learning_rate(RATE),
    )


def _given(tree: PyTree) -> Callable[[PyTree], PyTree]:
    """A function that gives a tree: optax would call a tree that is a module of Equinox."""
    return lambda params: tree


def with_optimizer(one: Setup, tx: Any) -> Setup:
    return one._replace(optimizer=tx)


def with_leaf(one: Setup, name: str, change: Callable[[jax.Array], jax.Array]) -> Setup:
    changed = lambda own, leaf: change(leaf) if own == name else leaf  # noqa: E731
    return one._replace(params=map_with_names(changed, one.params))


def a_hidden(one: Setup) -> str:
    return those(one, "hidden")[0]


def a_bias(one: Setup) -> str:
    return those(one, "bias")[-1]


# Multipliers.


@fault("microsoft/mup#41: without base shapes it is the standard parametrization", "base")
def missing_base(name: str, optimizer: str) -> Faulty:
    one = network(name)
    plan = archscale.parametrize(one.model(256), one.inputs, optimizer=optimizer)
    found = Setup(plan, plan.optimizer(RATE), loss_of(name, plan.apply), plan.init(KEY), one.batch)
    return found, set(those(found, "hidden", "readout"))


@fault("EleutherAI/gpt-neox#956: multipliers are switched off on the way", "rate")
def no_multipliers(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    tx = chained(one, dict.fromkeys(rates(one), 1.0), dict.fromkeys(rates(one), 0.0))
    return _rated(one, tx, rates(one))


@fault("google-deepmind/optax#364: in which order a chain applies what it holds", "rate")
def multipliers_before_adam(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if optimizer == "sgd":  # there they commute
        return None
    tx = optax.chain(one.plan.scale(), bare(one), optax.scale_by_learning_rate(RATE))
    return _rated(one, tx, rates(one))


@fault(f"{OWN}: plan.scale() behind plan.optimizer", "rate")
def multipliers_twice(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    return _rated(one, optax.chain(one.optimizer, one.plan.scale()), rates(one))


@fault("NVIDIA/Megatron-LM#3058: what is multiplied under SGD, and what under Adam", "rate")
def multipliers_of_another_optimizer(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    other = plan_of(name, "adamw" if optimizer == "sgd" else "sgd")
    applied = named_leaves(other.learning_rate)
    ratios = {leaf: applied[leaf] / own for leaf, own in rates(one).items()}
    tx = chained(one, applied, dict.fromkeys(applied, 0.0))
    return _deviating(one, tx, ratios)


@fault("microsoft/mup#71: one layer of many scales otherwise", "rate")
def wrong_rate_of_one_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    if any(leaf in group and len(group) < 3 for group in _groups(one)):
        leaf = a_bias(one)  # of two leaves either may be wrong
    applied = {own: value * (3 if own == leaf else 1) for own, value in rates(one).items()}
    tx = chained(one, applied, dict.fromkeys(applied, 0.0))
    return with_optimizer(one, tx), {leaf}


@fault("trueagi-io/FabricPC#44: another power of the depth in branches", "rate")
def wrong_depth_exponent(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if name not in ("transformer", "decoder"):
        return None
    other = plan_of(name, optimizer, depth_exponent=0.5)
    applied = named_leaves(other.learning_rate)
    ratios = {leaf: applied[leaf] / own for leaf, own in rates(one).items()}
    return _deviating(one, chained(one, applied, dict.fromkeys(applied, 0.0)), ratios)


def _rated(one: Setup, tx: Any, promised: Mapping[str, float]) -> Faulty:
    wrong = other_than(promised) & _shown(one, promised)
    return (with_optimizer(one, tx), wrong) if wrong else None


def _deviating(one: Setup, tx: Any, ratios: Mapping[str, float]) -> Faulty:
    """What is wrong up to a constant in every group of one kind of update, by the majority."""
    wrong = set()
    for group in _groups(one):
        values = sorted(round(ratios[name], 6) for name in group)
        counts = {value: values.count(value) for value in values}
        right = max(counts, key=lambda value: counts[value])
        if list(counts.values()).count(counts[right]) > 1:  # nobody can tell which are wrong
            return None
        wrong |= other_than({name: ratios[name] for name in group}, right)
    return (with_optimizer(one, tx), wrong) if wrong else None


def _groups(one: Setup) -> list[list[str]]:
    """Leaves whose rates can be compared."""
    names = list(rates(one))
    if one.plan.optimizer_name != "muon":
        return [names]
    own = matrices(one)
    return [[name for name in names if (name in own) == matrix] for matrix in (True, False)]


def _shown(one: Setup, promised: Mapping[str, float]) -> set[str]:
    """Leaves of groups in which multipliers differ."""
    found: set[str] = set()
    for group in _groups(one):
        if len({round(math.log(promised[name]), 3) for name in group}) > 1:
            found |= set(group)
    return found


# Decay.


@fault("microsoft/mup#1: decay that is scaled with the rate", "decay")
def decay_scaled_by_the_rate(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    decay = {leaf: float(value > 0) for leaf, value in decays(one).items()}
    promised = {leaf: decays(one)[leaf] for leaf in decay if decay[leaf]}
    wrong = _shown_decay(one, promised)
    tx = chained(one, rates(one), decay)
    return (with_optimizer(one, tx), wrong) if wrong else None


@fault("pytorch/pytorch#38853: by what decay is multiplied, and how often", "decay")
def decay_multiplied_twice(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    decay = {leaf: value**2 for leaf, value in decays(one).items()}
    promised = {leaf: decays(one)[leaf] for leaf in decay if decay[leaf]}
    wrong = _shown_decay(one, promised)
    return (with_optimizer(one, chained(one, rates(one), decay)), wrong) if wrong else None


def _shown_decay(one: Setup, ratios: Mapping[str, float]) -> set[str]:
    wrong = set()
    for group in _groups(one):
        own = {name: ratios[name] for name in group if name in ratios}
        if len({round(math.log(value), 3) for value in own.values()}) > 1:
            wrong |= other_than(own)
    return wrong


@fault("TransformerLensOrg/TransformerLens#460: decay of gains and biases", "decay")
def decay_of_gains_and_biases(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    decay = {leaf: value or 1.0 for leaf, value in decays(one).items()}
    wrong = set(those(one, "bias", "scale"))
    return with_optimizer(one, chained(one, rates(one), decay)), wrong


@fault("google-deepmind/optax#494: add_decayed_weights in front of adamw", "decay")
def decay_through_adam(name: str, optimizer: str) -> Faulty:
    if optimizer != "adamw":
        return None
    one = setup(name, optimizer, 0.0)
    weights = {leaf for leaf, value in decays(one).items() if value}
    decay = {leaf: float(leaf in weights) for leaf in decays(one)}
    return with_optimizer(one, optax.chain(decaying(decay), one.optimizer)), weights


@fault("google-deepmind/optax#160: a mask that is not made like the params", "decay")
def decay_mask_that_misses_a_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    decay = {own: 0.0 if own == leaf else value for own, value in decays(one).items()}
    return with_optimizer(one, chained(one, rates(one), decay)), {leaf}


# Which optimizer.


@fault("NVIDIA/Megatron-LM#3058: the multipliers of one optimizer behind another", "optimizer")
def another_optimizer(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    tx = optax.sgd(RATE) if optimizer != "sgd" else optax.adam(RATE)
    return with_optimizer(one, optax.chain(tx, one.plan.scale())), set(rates(one))


@fault("deepspeedai/DeepSpeed#7641: embeddings and readout under Muon", "optimizer")
def muon_of_tables_and_readouts(name: str, optimizer: str) -> Faulty:
    if optimizer != "muon":
        return None
    one = setup(name, optimizer)
    own = matrices(one)
    shapes = one.plan.architecture.shapes
    wrong = {leaf for leaf, shape in shapes.items() if len(shape) == 2 and leaf not in own}
    wrong = {leaf for leaf in wrong if min(shapes[leaf]) > 1}
    flat = MuonDimensionNumbers((0,), (1,))

    def numbers(params: PyTree) -> PyTree:
        found = archscale.muon_dimension_numbers(one.plan.architecture, params)
        is_leaf = lambda node: node is None or isinstance(node, MuonDimensionNumbers)  # noqa: E731
        named = named_leaves(found, is_leaf=is_leaf)
        return map_with_names(lambda leaf, _: flat if leaf in wrong else named[leaf], params)

    tx = muon(RATE, muon_weight_dimension_numbers=numbers)
    return with_optimizer(one, optax.chain(tx, one.plan.scale())), wrong


@fault("WatChMaL/WatChMaL#108: kernels and stacks that Muon leaves to Adam", "optimizer")
def adam_of_hidden_matrices(name: str, optimizer: str) -> Faulty:
    if optimizer != "muon":
        return None
    one = setup(name, optimizer)
    tx = optax.chain(optax.adam(RATE), one.plan.scale())
    return with_optimizer(one, tx), set(matrices(one))


@fault("AI-Hypercomputer/maxtext#4843: dimension numbers of other axes", "axes", "optimizer")
def muon_over_other_axes(name: str, optimizer: str) -> Faulty:
    """Heads, layers or positions of a kernel as matrices of their own, or not."""
    one = setup(name, optimizer)
    wrong = {leaf for leaf in matrices(one) if len(one.plan.architecture.shapes[leaf]) > 2}
    if optimizer != "muon" or not wrong:
        return None

    def other(matrix: Matrix, rank: int) -> MuonDimensionNumbers:
        if len(matrix.inputs) + len(matrix.outputs) < rank:  # layers of a stack, joined
            rest = set(range(rank)) - {*matrix.inputs, *matrix.outputs}
            return MuonDimensionNumbers((*rest, *matrix.inputs), matrix.outputs)
        return MuonDimensionNumbers(matrix.inputs[-1:], matrix.outputs[-1:])

    return _muon_with(one, wrong, other), wrong


@fault("MoonshotAI/Moonlight#31: by which shape an update is scaled", "rate")
def muon_of_transposed_kernels(name: str, optimizer: str) -> Faulty:
    if optimizer != "muon":
        return None
    one = setup(name, optimizer)
    turned = lambda matrix, rank: MuonDimensionNumbers(matrix.outputs, matrix.inputs)  # noqa: E731
    shapes = one.plan.architecture.shapes
    sizes = {leaf: own.sizes(shapes[leaf]) for leaf, own in matrices(one).items()}
    ratios = {leaf: math.sqrt(max(1, i / o) / max(1, o / i)) for leaf, (i, o) in sizes.items()}
    if len({round(value, 3) for value in ratios.values()}) < 2:
        return None
    return _muon_with(one, set(ratios), turned), other_than(ratios)


def _muon_with(one: Setup, leaves: set[str], change: Callable[[Matrix, int], Any]) -> Setup:
    own, shapes = matrices(one), one.plan.architecture.shapes

    def numbers(params: PyTree) -> PyTree:
        def of_leaf(leaf: str, _: Any) -> Any:
            if leaf not in own:
                return None
            if leaf in leaves:
                return change(own[leaf], len(shapes[leaf]))
            return MuonDimensionNumbers(*own[leaf])

        return map_with_names(of_leaf, params)

    tx = muon(RATE, muon_weight_dimension_numbers=numbers)
    return with_optimizer(one, optax.chain(tx, one.plan.scale()))


# Which leaves move, and when.


@fault("google-deepmind/optax#1274: labels that freeze more than they should", "frozen")
def frozen_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    labels = map_with_names(lambda own, _: "off" if own == leaf else "on", one.params)
    tx = optax.partition({"on": one.optimizer, "off": optax.set_to_zero()}, _given(labels))
    return with_optimizer(one, tx), {leaf}


@fault("google-deepmind/optax#159: what optax.masked leaves out keeps its gradient", "direction")
def masked_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    mask = map_with_names(lambda own, _: own != leaf, one.params)
    return with_optimizer(one, optax.masked(one.optimizer, _given(mask))), {leaf}


@fault("google-deepmind/optax#1780: a chain of scale_by_… without its last part", "direction")
def wrong_sign(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    tx = optax.chain(bare(one), one.plan.scale(), optax.scale(RATE))
    return with_optimizer(one, tx), set(rates(one))


@fault(f"google-research/bert#1293, {OWN} number_zero_first_update", "schedule")
def schedule_from_zero(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    schedule = optax.linear_schedule(0.0, RATE, 10)
    tx = one.plan.optimizer(schedule, DECAY, **SLOW.get(optimizer, {}))
    return with_optimizer(one, tx), EVERY


@fault("AI-Hypercomputer/maxtext#3452: a schedule that counts batches", "accumulation")
def schedule_of_batches(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    inner = optax.MultiSteps(one.plan.optimizer(1.0, 0.1), 4).gradient_transformation()
    outer = optax.scale_by_schedule(optax.cosine_decay_schedule(RATE, 100))
    if optimizer == "sgd":  # nothing else counts updates
        return None
    return with_optimizer(one, optax.chain(inner, outer)), EVERY


@fault("borisdayma/dalle-mini#122: apply_every calls the optimizer for every batch", "accumulation")
def updates_accumulated(name: str, optimizer: str) -> Faulty:
    if optimizer == "sgd":  # whose updates add up as gradients do
        return None
    one = setup(name, optimizer, 0.0)
    return with_optimizer(one, optax.chain(one.optimizer, optax.apply_every(4))), EVERY


@fault("google-deepmind/optax#320: what stands inside of MultiSteps and what outside",
       "accumulation")  # fmt: skip
def decay_of_every_batch(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    weights = {leaf: float(value > 0) for leaf, value in decays(one).items()}
    inner = optax.MultiSteps(one.optimizer, 4).gradient_transformation()
    outer = decaying({leaf: -1e-3 * value for leaf, value in weights.items()})
    return with_optimizer(one, optax.chain(inner, outer)), {n for n, v in weights.items() if v}


# Epsilon and clipping.


@fault("timsainb/Tensorflow-MultiGPU-VAE-GAN#2: a huge epsilon", "epsilon")
def large_epsilon(name: str, optimizer: str) -> Faulty:
    if optimizer == "sgd":
        return None
    one = setup(name, optimizer)
    tx = one.plan.optimizer(RATE, DECAY, eps=3.0)
    own = matrices(one) if optimizer == "muon" else {}
    # Biases of keys have no gradient: a softmax does not see them.
    return with_optimizer(one, tx), {n for n in rates(one) if n not in own and "key/bias" not in n}


@fault("arXiv 2505.01618, published code: epsilon by leaf", "epsilon")
def wrong_epsilon_of_one_leaf(name: str, optimizer: str) -> Faulty:
    if optimizer != "adamw":
        return None
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    epsilon = named_leaves(one.plan.epsilon)
    inverse = {own: 1 / (value * (16 if own == leaf else 1)) for own, value in epsilon.items()}
    return with_optimizer(one, optax.chain(by_leaf(inverse), chained(one, rates(one)))), {leaf}


@fault("facebookresearch/detr#198: a threshold far below the usual norm", "clipping")
def clipping_always(name: str, optimizer: str) -> Faulty:
    if optimizer == "muon":  # the norm of a gradient does not matter
        return None
    one = setup(name, optimizer)
    tx = optax.chain(optax.clip_by_global_norm(2e-3), one.optimizer)
    return with_optimizer(one, tx), EVERY


# Initial weights.


@fault("microsoft/mup#41: weights that the framework has drawn", "start")
def weights_of_the_framework(name: str, optimizer: str) -> Faulty:
    """A normal draw with 1/n everywhere, and the readout alike."""
    one = setup(name, optimizer)
    parameters = {each.name: each for each in one.plan.architecture.parameters}
    drawn = {each.name for each in one.plan.architecture.parameters if each.is_drawn}
    found = one
    wrong = set()
    for leaf in drawn:
        own = float(1 / math.sqrt(parameters[leaf].fan_in))
        key = jax.random.fold_in(KEY, zlib.crc32(leaf.encode()))
        values = own * jax.random.normal(key, parameters[leaf].shape)
        found = with_leaf(found, leaf, lambda w, values=values: values)
        ratio = own / np.asarray(named_leaves(one.plan.init_std)[leaf])
        if np.max(abs(np.log(ratio))) > 0.15:
            wrong.add(leaf)
    return (found, wrong) if wrong else None


@fault("microsoft/mup#23: a readout that is drawn like a hidden layer", "start")
def readout_drawn_as_hidden(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not (readouts := those(one, "readout")):
        return None
    return with_leaf(one, readouts[0], lambda w: 2 * w), {readouts[0]}


@fault("microsoft/mup#71: layers that start at zero", "start")
def zero_where_the_plan_draws(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    return with_leaf(one, a_hidden(one), jnp.zeros_like), {a_hidden(one)}


@fault("open-retina/open-retina#85: a readout that is not set as it was meant to be", "start")
def drawn_where_the_plan_has_zeros(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not (readouts := those(one, "readout")):
        return None
    plan = plan_of(name, optimizer, zero_init=("readout",))
    loss = loss_of(name, plan.apply)
    tx = plan.optimizer(RATE, **SLOW.get(optimizer, {}))
    return Setup(plan, tx, loss, one.params, one.batch), {readouts[0]}


@fault("google/flax#3019: biases drawn as PyTorch does", "start")
def drawn_biases(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_bias(one)
    return with_leaf(one, leaf, lambda w: w + jax.random.uniform(KEY, w.shape)), {leaf}


@fault("google/flax#1107: one key for all layers of a stack", "start")
def layers_that_are_the_same(name: str, optimizer: str) -> Faulty:
    if name != "decoder":
        return None
    one = setup(name, optimizer)
    repeat = lambda w: jnp.broadcast_to(w[:1], w.shape)  # noqa: E731
    return with_leaf(one, "layers/up", repeat), {"layers/up"}


@fault("google/flax#2754: initialization of a stack by its whole shape", "start")
def stack_drawn_by_its_whole_shape(name: str, optimizer: str) -> Faulty:
    if name != "decoder":
        return None
    one = setup(name, optimizer)
    return with_leaf(one, "layers/down", lambda w: w / math.sqrt(len(w))), {"layers/down"}


@fault("google-research/big_vision#41: params of another dtype", "dtype")
def integer_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    return with_leaf(one, a_bias(one), lambda w: w.astype(jnp.int32)), {a_bias(one)}


# The loss.


@fault("OpenBioML/protein-lm-scaling#64: a tied table without its multiplier", "multipliers")
def multipliers_of_the_model_left_out(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not one.plan.choice.forward.tables:
        return None
    return one._replace(loss_fn=loss_of(name, one.plan._model.apply)), {"table"}


@fault("huggingface/transformers#24725: a sum where a mean is meant", "loss")
def summed_loss(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    loss = one.loss_fn
    return one._replace(loss_fn=lambda params, batch: len(batch[1]) * loss(params, batch)), EVERY


@fault("lessw2020/FAdam_PyTorch#1: NaN where something is 0", "loss", "gradient")
def not_a_number(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf, loss = a_hidden(one), one.loss_fn

    def broken(params: PyTree, batch: Any) -> jax.Array:
        weight = named_leaves(params)[leaf]
        return loss(params, batch) + jnp.sqrt(jnp.sum((weight - weight) ** 2))

    return one._replace(loss_fn=broken), {leaf}


@fault("google-deepmind/optax#1274: weights behind a stop_gradient", "gradient")
def detached_leaf(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf, loss = a_hidden(one), one.loss_fn
    stop = lambda own, w: jax.lax.stop_gradient(w) if own == leaf else w  # noqa: E731
    detached = lambda params, batch: loss(map_with_names(stop, params), batch)  # noqa: E731
    return one._replace(loss_fn=detached), {leaf}


@fault(f"{OWN}: a ReLU that no example passes", "gradient")
def dead_units(name: str, optimizer: str) -> Faulty:
    if name not in ("mlp", "decoder"):
        return None
    one = setup(name, optimizer)
    if name == "mlp":
        before, behind = {"stem/w", "stem/b", "first/w", "first/b"}, {"second/w"}
        return with_leaf(one, "first/b", lambda b: b - 1e3), before | behind
    inside = {f"layers/{leaf}" for leaf in ("gain", "up", "bias", "down")}
    return with_leaf(one, "layers/bias", lambda b: b - 1e3), inside


@fault(f"{OWN}: images in 0 to 255", "inputs")
def inputs_that_are_not_normalized(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if jnp.issubdtype(one.batch[0].dtype, jnp.integer):
        return None
    return one._replace(batch=(255 * one.batch[0], one.batch[1])), EVERY


# More of what people do.


def _decay_where(one: Setup, decayed: Callable[[str], bool]) -> optax.GradientTransformation:
    values = decays(one)
    own = {leaf: (value or 1.0) if decayed(leaf) else 0.0 for leaf, value in values.items()}
    return chained(one, rates(one), own)


@fault(f"{OWN}: decay by the name of a leaf", "decay")
def decay_mask_by_name(name: str, optimizer: str) -> Faulty:
    """Whatever is not called bias decays."""
    one = setup(name, optimizer)
    if not (wrong := set(those(one, "scale"))):
        return None
    biases = set(those(one, "bias"))
    return with_optimizer(one, _decay_where(one, lambda leaf: leaf not in biases)), wrong


@fault(f"{OWN}: a mask of decay the other way round", "decay")
def decay_mask_inverted(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    tx = _decay_where(one, lambda leaf: not decays(one)[leaf])
    return with_optimizer(one, tx), set(decays(one))


@fault(f"{OWN}: add_decayed_weights behind the rate, which has the sign", "decay")
def decay_behind_the_rate(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    weights = {leaf for leaf, value in decays(one).items() if value}
    mask = map_with_names(lambda leaf, _: leaf in weights, one.params)
    tx = optax.chain(one.optimizer, optax.add_decayed_weights(1e-3, _given(mask)))
    return with_optimizer(one, tx), weights


@fault("arXiv 1711.05101: decay as a penalty of the loss", "decay")
def penalty_in_the_loss(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    weights = {leaf for leaf, value in decays(one).items() if value}
    loss = one.loss_fn

    def penalized(params: PyTree, batch: Any) -> jax.Array:
        leaves = named_leaves(params)
        return loss(params, batch) + 1e-3 * sum(jnp.sum(leaves[leaf] ** 2) for leaf in weights)

    return one._replace(loss_fn=penalized), weights


@fault(f"{OWN}: a table with the rate of hidden weights", "rate")
def table_with_the_rate_of_hidden(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    tables, own = those(one, "embedding", "input"), rates(one)
    usual = own[a_hidden(one)] if optimizer != "muon" else 0.25
    applied = {leaf: usual if leaf in tables else value for leaf, value in own.items()}
    tx = chained(one, applied, dict.fromkeys(own, 0.0))
    return _deviating(one, tx, {leaf: applied[leaf] / value for leaf, value in own.items()})


@fault(f"{OWN}: multipliers of a layer on its bias", "rate")
def biases_with_the_rate_of_their_weights(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    own, biases = rates(one), set(those(one, "bias"))
    applied = {leaf: value * (0.25 if leaf in biases else 1) for leaf, value in own.items()}
    tx = chained(one, applied, dict.fromkeys(own, 0.0))
    return _deviating(one, tx, {leaf: applied[leaf] / value for leaf, value in own.items()})


@fault(f"{OWN}: base and target swapped", "rate")
def base_and_target_swapped(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    applied = {leaf: 1 / value for leaf, value in rates(one).items()}
    tx = chained(one, applied, dict.fromkeys(applied, 0.0))
    return _rated(one, tx, rates(one))


@fault(f"{OWN}: base shapes of an older model", "rate")
def stale_base(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    target = network(name)
    other = archscale.parametrize(
        target.model(WIDTH), target.inputs, base=target.model(24), optimizer=optimizer
    )
    applied = named_leaves(other.learning_rate)
    ratios = {leaf: applied[leaf] / own for leaf, own in rates(one).items()}
    return _deviating(one, chained(one, applied, dict.fromkeys(applied, 0.0)), ratios)


@fault(f"{OWN}: a label that sends a leaf to another group", "rate")
def label_of_another_group(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    leaf = those(one, "bias")[0]
    labels = map_with_names(lambda own, _: "slow" if own == leaf else "usual", one.params)
    options = SLOW.get(optimizer, {})
    parts = {"slow": one.plan.optimizer(RATE / 5, 0.0, **options), "usual": one.optimizer}
    return with_optimizer(one, optax.partition(parts, _given(labels))), {leaf}


@fault(f"{OWN}: norms that labels freeze", "frozen")
def frozen_norms(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not (wrong := set(those(one, "scale"))):
        return None
    labels = map_with_names(lambda own, _: "off" if own in wrong else "on", one.params)
    parts = {"on": one.optimizer, "off": optax.set_to_zero()}
    return with_optimizer(one, optax.partition(parts, _given(labels))), wrong


@fault(f"{OWN}: what is clipped, and when", "clipping")
def updates_clipped_instead_of_gradients(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    if optimizer == "sgd":  # whose updates are small
        return None
    return with_optimizer(one, optax.chain(one.optimizer, optax.clip_by_global_norm(1e-2))), EVERY


@fault(f"{OWN}: entries of updates clipped below the rate", "rate", "clipping", "optimizer")
def entries_of_updates_clipped(name: str, optimizer: str) -> Faulty:
    if optimizer != "adamw":
        return None
    one = setup(name, optimizer, 0.0)
    small = min(rates(one).values())
    wrong = other_than(rates(one))  # as if no multiplier is applied
    tx = optax.chain(one.optimizer, optax.clip(0.9 * RATE * small))
    return (with_optimizer(one, tx), wrong) if wrong else None


@fault(f"{OWN}: updates relative to the weights", "optimizer")
def trust_ratio(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer, 0.0)
    tx = optax.chain(bare(one), optax.scale_by_trust_ratio(), one.plan.scale(),
                     optax.scale_by_learning_rate(RATE))  # fmt: skip
    return with_optimizer(one, tx), set(rates(one))


@fault(f"{OWN}: a hyperparameter that is injected with another value", "epsilon")
def injected_epsilon(name: str, optimizer: str) -> Faulty:
    if optimizer != "adamw":
        return None
    one = setup(name, optimizer)
    tx = optax.inject_hyperparams(one.plan.optimizer)(learning_rate=RATE, eps=3.0)
    return with_optimizer(one, tx), {leaf for leaf in rates(one) if "key/bias" not in leaf}


@fault(f"{OWN}: a loss that is scaled, and gradients that are not unscaled", "loss")
def scaled_loss(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    loss = one.loss_fn
    return one._replace(loss_fn=lambda params, batch: 1024.0 * loss(params, batch)), EVERY


@fault(f"{OWN}: a loss divided by the batches that are accumulated",
       "accumulation")  # fmt: skip
def loss_divided_by_accumulated_batches(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    loss = one.loss_fn
    tx = optax.MultiSteps(one.optimizer, 4)
    divided = lambda params, batch: loss(params, batch) / 4  # noqa: E731
    return one._replace(loss_fn=divided, optimizer=tx), EVERY


@fault(f"{OWN}: a readout that is multiplied in the model, and in its draw", "multipliers")
def readout_multiplied_in_the_loss_too(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    evaluate = one.plan.apply
    scaled = lambda params, *inputs: 0.25 * evaluate(params, *inputs)  # noqa: E731
    readouts = set(those(one, "readout")) or {"table"}
    return one._replace(loss_fn=loss_of(name, scaled)), readouts


@fault(f"{OWN}: a draw by the outputs", "start")
def drawn_by_outputs(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    own = {each.name: each for each in one.plan.architecture.parameters}
    factors = {}
    for leaf in those(one, "hidden"):
        matrix = matrix_of(own[leaf])
        if isinstance(matrix, Matrix):
            inputs, outputs = matrix.sizes(own[leaf].shape)
            factors[leaf] = math.sqrt(inputs / outputs)
    wrong = other_than(factors)
    change = lambda leaf, w: w * factors[leaf] if leaf in wrong else w  # noqa: E731
    return (one._replace(params=map_with_names(change, one.params)), wrong) if wrong else None


@fault(f"{OWN}: a uniform draw whose bound is the deviation", "start")
def uniform_by_its_bound(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    leaf = a_hidden(one)
    draw = lambda w: jnp.std(w) * jax.random.uniform(KEY, w.shape, minval=-1, maxval=1)  # noqa: E731
    return with_leaf(one, leaf, draw), {leaf}


@fault(f"{OWN}: gains that start at 0 as biases do", "start")
def gains_at_zero(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not (gains := those(one, "scale")):
        return None
    return with_leaf(one, gains[-1], jnp.zeros_like), {gains[-1]}


@fault(f"{OWN}: a tied table that is drawn as a readout", "start")
def table_drawn_as_readout(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if not (tables := those(one, "embedding")):
        return None
    width = one.plan.architecture.shapes[tables[-1]][-1]
    return with_leaf(one, tables[-1], lambda w: w / math.sqrt(width)), {tables[-1]}


@fault(f"{OWN}: a leaf that half precision misses", "dtype")
def leaf_of_another_precision(name: str, optimizer: str) -> Faulty:
    one = setup(name, optimizer)
    if len(those(one, "hidden")) < 3:
        return None
    half = lambda w: w.astype(jnp.bfloat16)  # noqa: E731
    return with_leaf(one, a_hidden(one), half), {a_hidden(one)}


def faulty(names: Iterable[str], optimizers: Iterable[str]) -> dict[tuple[str, str, str], Any]:
    """Returns functions that make the faults which there are, by fault, network and optimizer."""
    return {
        (key, name, optimizer): functools.partial(one.make, name, optimizer)
        for key, one in FAULTS.items()
        for name in names
        for optimizer in optimizers
    }


# Right set-ups.

RIGHT: dict[str, Callable[[str, str], Setup | None]] = {}


def right(make: Callable[[str, str], Setup | None]) -> Callable[[str, str], Setup | None]:
    RIGHT[make.__name__] = make
    return make


def _plain(one: Setup, *arguments: Any, **options: Any) -> optax.GradientTransformation:
    own = SLOW.get(one.plan.optimizer_name, {})
    return one.plan.optimizer(*(arguments or (RATE, DECAY)), **{**own, **options})


@right
def plain(name: str, optimizer: str) -> Setup:
    return setup(name, optimizer)


@right
def scale_behind(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    tx = optax.chain(bare(one), one.plan.scale(), optax.scale_by_learning_rate(RATE))
    return with_optimizer(one, tx)


@right
def masked(name: str, optimizer: str) -> Setup:
    """Everything is trained, by two masks."""
    one = setup(name, optimizer)
    some = map_with_names(lambda own, _: "bias" in own, one.params)
    rest = jax.tree.map(lambda flag: not flag, some)
    parts = [optax.masked(_plain(one), _given(mask)) for mask in (some, rest)]
    return with_optimizer(one, optax.chain(*parts))


@right
def partitioned(name: str, optimizer: str) -> Setup:
    """Decay by label."""
    one = setup(name, optimizer)
    labels = map_with_names(lambda own, _: "all" if decays(one)[own] else "none", one.params)
    parts = {"all": _plain(one), "none": _plain(one, RATE, 0.0)}
    return with_optimizer(one, optax.partition(parts, _given(labels)))


@right
def accumulated(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    return with_optimizer(one, optax.MultiSteps(_plain(one), 3))


@right
def scheduled_and_accumulated(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    schedule = optax.warmup_cosine_decay_schedule(RATE / 10, RATE, 10, 100)
    tx = optax.chain(optax.clip_by_global_norm(1.0), _plain(one, schedule, DECAY))
    return with_optimizer(one, optax.MultiSteps(tx, 4).gradient_transformation())


@right
def injected(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    tx = optax.inject_hyperparams(one.plan.optimizer)(learning_rate=RATE, weight_decay=DECAY)
    return with_optimizer(one, tx)


@right
def guarded_and_clipped(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.clip(1.0), _plain(one))
    return with_optimizer(one, optax.apply_if_finite(tx, 3))


@right
def half_precision(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    options = {} if optimizer == "sgd" else {"mu_dtype": jnp.float32}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params)
    return with_optimizer(one._replace(params=params), _plain(one, **options))


@right
def other_options(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    options: dict[str, Any] = {
        "sgd": {"momentum": 0.8, "nesterov": True},
        "adamw": {"b1": 0.8, "b2": 0.95, "eps": 1e-10, "nesterov": True},
        "muon": {"beta": 0.9, "consistent_rms": 0.2, "adam_learning_rate": 1e-3},
    }[optimizer]
    return with_optimizer(one, _plain(one, **options))


@right
def zeros_that_are_meant(name: str, optimizer: str) -> Setup | None:
    if not those(setup(name, optimizer), "readout"):
        return None
    plan = plan_of(name, optimizer, zero_init=("readout",))
    one = setup(name, optimizer)
    one = Setup(plan, None, loss_of(name, plan.apply), plan.init(KEY), one.batch)
    return with_optimizer(one, _plain(one))


@right
def forward_multipliers(name: str, optimizer: str) -> Setup:
    plan = plan_of(name, optimizer, form="multipliers")
    one = Setup(plan, None, loss_of(name, plan.apply), plan.init(KEY), network(name).batch)
    return with_optimizer(one, _plain(one))


@right
def compiled_loss_with_more_results(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    loss = one.loss_fn
    return one._replace(loss_fn=jax.jit(lambda params, batch: (loss(params, batch), batch[1])))


@right
def the_base_itself(name: str, optimizer: str) -> Setup:
    one = network(name)
    plan = archscale.parametrize(one.model(8), one.inputs, optimizer=optimizer)
    found = Setup(plan, None, loss_of(name, plan.apply), plan.init(KEY), one.batch)
    return with_optimizer(found, _plain(found))


@right
def clipped_relative_to_weights(name: str, optimizer: str) -> Setup:
    one = setup(name, optimizer)
    return with_optimizer(one, optax.chain(optax.adaptive_grad_clip(0.1), _plain(one)))


@right
def half_a_masked_mean(name: str, optimizer: str) -> Setup:
    """Half of the mean over the examples that count, and two batches an update."""
    one = setup(name, optimizer)
    loss = one.loss_fn

    def masked(params: PyTree, batch: Any) -> jax.Array:
        each = jax.vmap(lambda *example: loss(params, jax.tree.map(lambda e: e[None], example)))
        mask = jnp.arange(len(batch[1])) % 4 > 0
        return 0.5 * jnp.sum(mask * each(*batch)) / jnp.sum(mask)

    return with_optimizer(one._replace(loss_fn=masked), optax.MultiSteps(_plain(one), 2))


def rightly(name: str, optimizers: Iterable[str]) -> list[tuple[str, str, str]]:
    """Returns the right set-ups of a network."""
    return [(key, name, optimizer) for key in RIGHT for optimizer in optimizers]
