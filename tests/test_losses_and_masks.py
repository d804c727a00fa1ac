"""What is read of losses, heads and penalties; what masks hide; what low precision keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import archscale_jax as archscale

pytestmark = pytest.mark.quick_compilation

EXAMPLE = jax.ShapeDtypeStruct((2, 16), jnp.float32)
LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)


class Perceptron(nn.Module):
    depth: int = 3
    normalized: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, param_dtype=self.dtype)(x)
        for _ in range(self.depth):
            x = nn.Dense(16, param_dtype=self.dtype)(nn.relu(x))
            x = nn.BatchNorm(use_running_average=False)(x) if self.normalized else x
        return nn.Dense(16, param_dtype=self.dtype)(nn.relu(x))


def perceptron(**options):
    """The network, the shapes of its variables, and its architecture."""
    model = Perceptron(**options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), EXAMPLE)
    return model, shapes, archscale.trace(model.apply, shapes, EXAMPLE)


def loss_and_aux(model):
    def loss(params, x, labels):
        logits = model.apply(params, x)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value, {"logits": logits, "accuracy": jnp.mean(logits.argmax(-1) == labels)}

    return loss


def path_depths(architecture):
    statistics = archscale.path_statistics(architecture.graph)
    return statistics.count, statistics.min_depth, statistics.max_depth


def test_a_loss_with_aux_has_the_architecture_of_its_logits():
    model, shapes, logits = perceptron()
    loss = archscale.trace(loss_and_aux(model), shapes, EXAMPLE, LABELS)
    assert loss.parameters == logits.parameters
    assert path_depths(loss) == path_depths(logits) == (1, 3, 3)


def test_what_is_returned_beside_the_logits_counts_as_an_output_but_averages_raise():
    model = Perceptron(normalized=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), EXAMPLE)

    def apply(params, batch_stats, x):
        both = {"params": params, "batch_stats": batch_stats}
        return model.apply(both, x, mutable=["batch_stats"])

    inputs = variables["params"], variables["batch_stats"], EXAMPLE
    alone = archscale.trace(lambda *inputs: apply(*inputs)[0], *inputs)
    assert path_depths(alone) == (1, 3, 3)
    with pytest.raises(archscale.TraceError, match="running averages .* trace its first part"):
        archscale.trace(apply, *inputs)
    # Under another name, the averages of every hidden layer: as deep as the layer.
    everything = archscale.trace(lambda *inputs: jax.tree.leaves(apply(*inputs)), *inputs)
    assert path_depths(everything) == (3, 1, 3)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(nn.relu(nn.Dense(16)(x))))
        return nn.Dense(3, name="left")(x), nn.Dense(5, name="right")(x)


def test_heads_are_readouts_in_their_tuple_and_in_the_sum_of_their_losses():
    model = TwoHeads()
    shapes = jax.eval_shape(model.init, jax.random.key(0), EXAMPLE)

    def total(params, x):
        return sum(jnp.mean(jnp.square(head)) for head in jax.tree.leaves(model.apply(params, x)))

    for function in (model.apply, total):
        parameters = archscale.trace(function, shapes, EXAMPLE).parameters
        roles = {parameter.name: parameter.role for parameter in parameters}
        assert roles["params/left/kernel"] == roles["params/right/kernel"] == "readout"


def test_a_penalty_on_the_weights_is_passed_over():
    model, shapes, logits = perceptron()

    def loss(params, x, labels):
        value, _ = loss_and_aux(model)(params, x, labels)
        return value + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    with_penalty = archscale.trace(loss, shapes, EXAMPLE, LABELS)
    assert with_penalty.shapes == logits.shapes
    assert path_depths(with_penalty) == path_depths(logits)
    roles = [
        {parameter.name: parameter.role for parameter in one.parameters}
        for one in (with_penalty, logits)
    ]
    assert roles[0] == roles[1]


class TestFrozen:
    """One layer is hidden from the multiplier, or from the optimizer as well."""

    def updates(self, wrap):
        _, shapes, architecture = perceptron()
        _, _, base = perceptron(depth=1)
        scale = archscale.scale_by_architecture(architecture, base, "depth")
        trained = jax.tree_util.tree_map_with_path(
            lambda path, _: "Dense_1" not in jax.tree_util.keystr(path), shapes
        )
        tx = optax.chain(optax.sgd(1.0), wrap(scale, trained))
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
        found, _ = tx.update(ones, tx.init(ones), ones)
        return {
            name: {float(value) for leaf in layer.values() for value in np.unique(leaf)}
            for name, layer in found["params"].items()
        }

    MULTIPLIER = -float(np.float32(3**-1.5))  # of three layers against one

    def test_masked_exempts_from_the_multiplier(self):
        found = self.updates(optax.masked)
        assert found.pop("Dense_1") == {-1.0}
        assert all(values == {self.MULTIPLIER} for values in found.values())

    def test_updates_set_to_zero_freeze(self):
        def wrap(scale, trained):
            groups = jax.tree.map(lambda keep: "trained" if keep else "frozen", trained)
            return optax.multi_transform({"trained": scale, "frozen": optax.set_to_zero()}, groups)

        found = self.updates(wrap)
        assert found.pop("Dense_1") == {0.0}
        assert all(values == {self.MULTIPLIER} for values in found.values())


def test_low_precision_keeps_its_dtype():
    _, shapes, architecture = perceptron(dtype=jnp.bfloat16)
    _, _, base = perceptron(depth=1)
    params = archscale.initialize(jax.random.key(0), shapes, architecture)
    tx = optax.chain(optax.sgd(1.0), archscale.scale_by_architecture(architecture, base, "depth"))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    for tree in (params, updates, optax.apply_updates(params, updates)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    # The multiplier is rounded once, into the update.
    wanted = -jnp.float32(3**-1.5).astype(jnp.bfloat16)
    assert all((leaf == wanted).all() for leaf in jax.tree.leaves(updates))
