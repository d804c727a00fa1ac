"""Models of any sharding: the same numbers as on one device, and nothing whole on any.

Every test runs on eight virtual devices in a process of its own, see `tests.devices`.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import archscale_jax as archscale
from archscale_jax._architecture import named_leaves
from tests.devices import on_devices

pytestmark = pytest.mark.quick_compilation

AXES = {"auto": (AxisType.Auto,) * 2, "explicit": (AxisType.Explicit,) * 2}
KEY = 7
WIDTH, HEADS, HEAD, HIDDEN, TOKENS, LENGTH, CLASSES = 32, 8, 4, 64, 64, 6, 16


def mesh_of(kind="auto"):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=AXES[kind])


# A transformer in plain JAX, which says where everything lies in whatever way it is asked to.

BLOCK = {"scale": (WIDTH,), "query": (WIDTH, HEADS, HEAD), "key": (WIDTH, HEADS, HEAD),
         "value": (WIDTH, HEADS, HEAD), "query_bias": (HEADS, HEAD), "out": (HEADS, HEAD, WIDTH),
         "up": (WIDTH, HIDDEN), "up_bias": (HIDDEN,), "down": (HIDDEN, WIDTH),
         "down_bias": (WIDTH,)}  # fmt: skip
SHAPES = {"table": (TOKENS, WIDTH), "position": (LENGTH, WIDTH), "blocks": [BLOCK],
          "head": (WIDTH, CLASSES)}  # fmt: skip
BLOCK_SPECS = {"scale": P(), "query": P("data", "model"), "key": P("data", "model"),
               "value": P("data", "model"), "query_bias": P("model"),
               "out": P("model", None, "data"), "up": P("data", "model"), "up_bias": P("model"),
               "down": P("model", "data"), "down_bias": P()}  # fmt: skip
SPECS = {"table": P("model"), "position": P(), "blocks": [BLOCK_SPECS],
         "head": P(None, "model")}  # fmt: skip


def shapes(dtype=jnp.float32):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def sharded(mesh, tree=None, specs=SPECS):
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        tree or shapes(),
        specs,
    )


def transformer(params, tokens, *, total=lambda x: x, whole=lambda w, axis: w, first=None,
                put=lambda x, *spec: x, rows=None, einsum=jnp.einsum):  # fmt: skip
    """Logits [batch, length, classes].

    Args:
      params: as `SHAPES`, or a device's shards of them.
      tokens: [batch, length].
      total: sums what devices along the axis `model` have of a product.
      whole: gathers a weight that is divided along an axis.
      first: number of the first row of this device's part of the table.
      put: asks for a layout.
      rows: of the table, how to look them up.
      einsum: over an axis that is divided.
    """
    table = params["table"]
    if first is not None:
        row = tokens - first(len(table))
        mine = (row >= 0) & (row < len(table))
        x = total(jnp.where(mine[..., None], table[jnp.clip(row, 0, len(table) - 1)], 0))
    else:
        x = (rows or (lambda table, tokens: table[tokens]))(table, tokens)
    x = put(x + params["position"], "data", None, None)
    for block in params["blocks"]:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * block["scale"]
        query, key, value = (
            put(jnp.einsum("bsd,dhk->bshk", y, whole(block[name], 0)), "data", None, "model", None)
            for name in ("query", "key", "value")
        )
        query = query + block["query_bias"]
        attention = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", query, key))
        y = jnp.einsum("bhst,bthk->bshk", attention, value)
        y = total(einsum("bshk,hkd->bsd", y, whole(block["out"], 2)))
        x = x + put(y, "data", None, None)
        y = jax.nn.gelu(put(x @ whole(block["up"], 0), "data", None, "model") + block["up_bias"])
        y = total(einsum("bsf,fd->bsd", y, whole(block["down"], 1)))
        x = x + put(y, "data", None, None) + block["down_bias"]
    return x @ params["head"]


def constrained(params, tokens):
    return transformer(
        params, tokens, put=lambda x, *spec: jax.lax.with_sharding_constraint(x, P(*spec))
    )


def by_hand(mesh, params, tokens):
    """The transformer in one `shard_map`: FSDP over `data`, tensor parallel over `model`."""
    function = functools.partial(
        transformer,
        total=lambda x: jax.lax.psum(x, "model"),
        whole=lambda w, axis: jax.lax.all_gather(w, "data", axis=axis, tiled=True),
        first=lambda rows: jax.lax.axis_index("model") * rows,
    )
    return jax.shard_map(
        function, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=P("data", None, "model"),
        check_vma=False,
    )(params, tokens)  # fmt: skip


def explicit(params, tokens):
    """The transformer as a mesh of explicit axes wants it: no sharding is left to guess."""

    def whole(weight, axis):
        spec = [None if name == "data" else name for name in jax.typeof(weight).sharding.spec]
        return jax.sharding.reshard(weight, P(*spec))

    out = P("data", None, None)
    params = {**params, "head": whole(params["head"], 0)}
    return transformer(
        params, tokens, whole=whole,
        put=lambda x, *spec: jax.sharding.reshard(x, P(*spec)),
        rows=lambda table, tokens: table.at[tokens].get(out_sharding=out),
        einsum=functools.partial(jnp.einsum, out_sharding=out),
    )  # fmt: skip


def tokens(batch=8):
    return jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, (batch, LENGTH)))


def loss(function, params, tokens):
    targets = jax.nn.one_hot(tokens % CLASSES, CLASSES)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(function(params, tokens)) * targets, -1))


def same_architecture(found, expected):
    for field in ("senders", "receivers"):
        np.testing.assert_array_equal(
            getattr(found.graph, field), getattr(expected.graph, field), err_msg=field
        )
    for field, values in expected.graph.edges.items():
        np.testing.assert_array_equal(found.graph.edges[field], values, err_msg=field)
    assert found.arrangement == expected.arrangement
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        assert without_lines(one) == without_lines(other)


def without_lines(parameter):
    """A parameter without the lines and expressions of its uses, which are spelled otherwise."""
    uses = tuple(dataclasses.replace(use, source="", expression=None) for use in parameter.uses)
    return dataclasses.replace(parameter, uses=uses)


def equal(found, expected, specs=None):
    """The same bits; and, with specs, laid out so and not otherwise."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, leaf in named_leaves(found).items():
        np.testing.assert_array_equal(leaf, named_leaves(expected)[name], err_msg=name)
    if specs is not None:
        for leaf, spec in zip(jax.tree.leaves(found), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(
                NamedSharding(leaf.sharding.mesh, spec), leaf.ndim
            ), (leaf.sharding, spec)


def nothing_whole(compiled, leaves):
    """A program that returns such leaves makes no more than shards, and no device asks another."""
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    made = {
        tuple(map(int, one.split(","))) if one else ()
        for one in re.findall(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]*)\]", text)
    }
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    assert max(map(math.prod, made)) == max(map(math.prod, shards))
    divided = {leaf.shape for leaf in leaves} - set(shards)
    assert divided and not divided & made
    size = sum(math.prod(shard) * leaf.dtype.itemsize
               for leaf, shard in zip(leaves, shards, strict=True))  # fmt: skip
    pointers = 8 * (len(leaves) + 1)  # of the tuple that holds them
    assert size <= compiled.memory_analysis().output_size_in_bytes <= size + pointers


# Initialization.

LAYERS = {"up": ((16, 32), P("data", "model")), "scale": ((32,), P()), "bias": ((32,), P("model")),
          "down": ((32, 8), P("model", "data"))}  # fmt: skip


def layers(dtype, mesh=None):
    def struct(shape, spec):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = {name: struct(*one) for name, one in LAYERS.items()}
    return params, {name: spec for name, (_, spec) in LAYERS.items()}


def perceptron(params, x):
    return jax.nn.relu(x @ params["up"] * params["scale"] + params["bias"]) @ params["down"]


def check_initialize(kind, dtype, eagerly):
    plain, specs = layers(dtype)
    architecture = archscale.trace(perceptron, plain, jax.ShapeDtypeStruct((4, 16), dtype))
    key = jax.random.key(7)
    expected = jax.device_get(archscale.initialize(key, plain, architecture))
    mesh = mesh_of(kind)
    structs, _ = layers(dtype, mesh)
    check = functools.partial(equal, expected=expected, specs=specs)
    places = {name: struct.sharding for name, struct in structs.items()}
    arrays = jax.device_put(expected, places)
    if (
        eagerly
    ):  # from shapes and from arrays, in and out of a context, by a key that lies elsewhere
        check(archscale.initialize(key, structs, architecture))
        check(archscale.initialize(jax.device_put(key, jax.devices()[3]), arrays, architecture))
        with jax.set_mesh(mesh):
            check(archscale.initialize(key, arrays, architecture))

    def compiled(function, *arguments, **options):
        program = jax.jit(function, **options).lower(*arguments).compile()
        nothing_whole(program, list(structs.values()))
        return program

    with jax.set_mesh(mesh):
        check(compiled(lambda key: archscale.initialize(key, structs, architecture), key)(key))
        if kind == "explicit":  # the shardings of arguments are in their types
            check(jax.jit(lambda params: archscale.initialize(key, params, architecture))(arrays))
    # Out of a context out_shardings are enough.
    check(
        compiled(
            lambda key: archscale.initialize(key, plain, architecture), key, out_shardings=places
        )(key)
    )


def check_initialization():
    check_initialize("auto", jnp.dtype("float32"), eagerly=True)
    check_initialize("explicit", jnp.dtype("bfloat16"), eagerly=False)


def test_initialize_draws_the_same_bits_in_shards():
    on_devices(check_initialization, as_users=True)


def check_seeds():
    mesh = mesh_of()
    (plain, specs), (structs, _) = layers("float32"), layers("float32", mesh)
    architecture = archscale.trace(perceptron, plain, jax.ShapeDtypeStruct((4, 16), "float32"))
    seeds = jax.random.split(jax.random.key(0), 2)
    several = jax.jit(jax.vmap(lambda key: archscale.initialize(key, structs, architecture)))(seeds)
    single = [jax.device_get(archscale.initialize(key, plain, architecture)) for key in seeds]
    specs = {name: P(None, *spec) for name, spec in specs.items()}
    equal(several, jax.tree.map(lambda *both: np.stack(both), *single), specs)
    # Params that were put nowhere stay free to meet sharded data.
    free = archscale.initialize(seeds[0], plain, architecture)
    assert not any(leaf.committed for leaf in free.values())
    x = jax.device_put(np.ones((8, 16), "f4"), NamedSharding(mesh, P("data")))
    jax.jit(perceptron)(free, x)


def test_initialize_maps_over_seeds_and_leaves_free_params_free():
    on_devices(check_seeds, as_users=True)


def check_indivisible():
    mesh = mesh_of()
    params = {"blocks": [{"up": jax.ShapeDtypeStruct((16, 30), "float32")}],
              "down": jax.ShapeDtypeStruct((30, 8), "float32")}  # fmt: skip
    architecture = archscale.trace(
        lambda params, x: jax.nn.relu(x @ params["blocks"][0]["up"]) @ params["down"],
        params, jax.ShapeDtypeStruct((4, 16), "float32"),
    )  # fmt: skip
    sharding = NamedSharding(mesh, P(None, ("data", "model")))
    up = jax.ShapeDtypeStruct((16, 30), "float32", sharding=sharding)
    params["blocks"][0]["up"] = up
    message = (
        r"parameter 'blocks/0/up' has shape \(16, 30\), and its axis 1 cannot be divided over the "
        r"mesh axes \{'data': 2, 'model': 4\}"
    )
    with pytest.raises(ValueError, match=message):
        archscale.initialize(jax.random.key(0), params, architecture)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda key: archscale.initialize(key, params, architecture))(jax.random.key(0))


def test_a_leaf_that_the_mesh_does_not_divide_is_named():
    on_devices(check_indivisible)


def check_stacked():
    mesh = mesh_of()
    places = {
        "stem": ((8, 16), P(None, "model")),
        "up": ((3, 16, 64), P(None, "data", "model")),
        "down": ((3, 64, 16), P(None, "model", "data")),
        "head": ((16, 8), P("data")),
    }

    def apply(params, x):
        def block(x, weights):
            return x + jax.nn.relu(x @ weights[0]) @ weights[1], None

        x, _ = jax.lax.scan(block, x @ params["stem"], (params["up"], params["down"]))
        return x @ params["head"]

    structs = {
        name: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in places.items()
    }
    architecture = archscale.trace(apply, structs, jax.ShapeDtypeStruct((4, 8), "float32"))
    assert len(architecture.parameters[0].further_edges) == 2  # three layers in one leaf
    leaves = list(structs.values())
    key = jax.random.key(0)
    program = jax.jit(lambda key: archscale.initialize(key, structs, architecture))
    program = program.lower(key).compile()
    nothing_whole(program, leaves)
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == 8  # the key is all that goes in
    tx = archscale.scale_by_architecture(architecture, archscale.dag_graph("2"), "path_sum")
    nothing_whole(jax.jit(tx.update).lower(structs, optax.EmptyState()).compile(), leaves)
    plain = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in structs.items()}
    specs = {name: spec for name, (_, spec) in places.items()}
    equal(program(key), jax.device_get(archscale.initialize(key, plain, architecture)), specs)


def test_stacked_layers_are_born_in_shards():
    on_devices(check_stacked, as_users=True)


# Reading.


class Boxed(nn.Module):
    """A perceptron of Flax, whose parameters come in boxes that name mesh axes, or do not."""

    boxed: bool

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.lecun_normal()
        for width, axes in ((64, ("data", "model")), (8, ("model", "data"))):
            kernel = nn.with_partitioning(draw, axes) if self.boxed else draw
            x = nn.relu(nn.Dense(width, kernel_init=kernel)(x))
        return nn.Dense(4)(x)


class Annotated(nnx.Module):
    """The same in NNX."""

    def __init__(self, boxed, rngs):
        draw = nn.initializers.lecun_normal()
        self.layers = nnx.List([])
        widths = (16, 64, 8, 4)
        for number, axes in enumerate((("data", "model"), ("model", "data"), ())):
            sizes = widths[number : number + 2]
            kernel = nnx.with_partitioning(draw, axes) if boxed and axes else draw
            self.layers.append(nnx.Linear(*sizes, kernel_init=kernel, rngs=rngs))

    def __call__(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if number else x)
        return x


def check_trace():
    expected = archscale.trace(transformer, shapes(), tokens())
    fans = {one.name: (one.fan_in, one.fan_out) for one in expected.parameters}
    assert fans["blocks/0/out"] == (HEADS * HEAD, WIDTH)
    same = functools.partial(same_architecture, expected=expected)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        same(archscale.trace(constrained, sharded(mesh), tokens()))
    same(archscale.trace(functools.partial(by_hand, mesh), sharded(mesh), tokens()))
    mesh = mesh_of("explicit")
    rows = jax.ShapeDtypeStruct((8, LENGTH), "int32", sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        same(archscale.trace(explicit, sharded(mesh), rows))


def test_trace_reads_the_same_architecture_however_the_model_is_divided():
    on_devices(check_trace)


def check_boxes():
    mesh, x = mesh_of(), jnp.zeros((8, 16))
    key = jax.random.key(0)
    plain, boxed = (jax.eval_shape(Boxed(one).init, key, x) for one in (False, True))
    expected = archscale.trace(Boxed(False).apply, plain, x)
    with jax.set_mesh(mesh):
        found = archscale.trace(Boxed(True).apply, boxed, x)
        places = nn.get_sharding(boxed, mesh)
        born = jax.jit(lambda: archscale.initialize(key, boxed, found), out_shardings=places)()
    same_architecture(found, expected)
    kernel = born["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.value.sharding.spec == P("data", "model")
    drawn = archscale.initialize(key, plain, expected)
    np.testing.assert_array_equal(kernel.value, drawn["params"]["Dense_0"]["kernel"])

    plain, states = nnx.eval_shape(lambda: Annotated(False, nnx.Rngs(0))), {}
    graphdef, states[False] = nnx.split(plain)
    expected = archscale.trace(lambda state, x: nnx.merge(graphdef, state)(x), states[False], x)
    with jax.set_mesh(mesh):
        annotated, state = nnx.get_abstract_model(lambda: Annotated(True, nnx.Rngs(0)), mesh)
        found = archscale.trace(lambda state, x: nnx.merge(annotated, state)(x), state, x)
        born = jax.jit(lambda: archscale.initialize(key, state, found))()
    same_architecture(found, expected)
    drawn = archscale.initialize(key, states[False], expected)
    leaves = zip(jax.tree.leaves(born), jax.tree.leaves(drawn), strict=True)
    assert all(np.array_equal(one, other) for one, other in leaves)
    assert named_leaves(born)["layers/0/kernel"].sharding.spec == P("data", "model")


def test_boxes_of_flax_name_the_axes():
    on_devices(check_boxes)


def check_errors():
    mesh = mesh_of()
    weights = {"stem": (16, 32), "stages": (4, 32, 32), "sliced": (32, 32), "head": (32, 4)}
    weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in weights.items()}
    x = jax.ShapeDtypeStruct((8, 16), "float32")

    def apply(name, inner, spec, out, params, x):
        body = jax.shard_map(inner, mesh=mesh, in_specs=(spec, P()), out_specs=out, check_vma=False)
        return body(params[name], x @ params["stem"]) @ params["head"]

    def stage(weight, x):  # every device another layer
        order = [(device, (device + 1) % 4) for device in range(4)]
        return jax.lax.ppermute(jax.nn.relu(x @ weight[0]), "model", order)

    def columns(weight, x):  # every device others of the columns
        start = jax.lax.axis_index("model") * 8
        return jax.nn.relu(x @ jax.lax.dynamic_slice_in_dim(weight, start, 8, 1))

    for name, *rest in (("stages", stage, P("model"), P()),
                        ("sliced", columns, P(), P(None, "model"))):  # fmt: skip
        params = {one: weights[one] for one in ("stem", name, "head")}
        function = functools.partial(apply, name, *rest)
        with pytest.raises(archscale.TraceError, match=f"dot_general of parameter '{name}' at .*"
                           "inside jax.shard_map the devices hold parts of it"):  # fmt: skip
            archscale.trace(function, params, x)
    with pytest.raises(archscale.TraceError, match="vertex 0 do not leave the jax.shard_map at"):
        features = functools.partial(archscale.vertex_features, functools.partial(by_hand, mesh))
        jax.eval_shape(features, shapes(), tokens())


def test_what_shard_map_hides_raises():
    on_devices(check_errors)


# Training and measuring, in double precision: the order of sums is all that differs.


def train(apply, params, tx, batches):
    """Losses of the steps, and the params after them."""

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(functools.partial(loss, apply))(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(tx.init)(params), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return losses, params


def measure(apply, params, batch):
    @jax.jit
    def size(params, batch):
        return archscale.measure_update(
            functools.partial(archscale.vertex_features, apply),
            functools.partial(loss, apply), params, batch, optax.sgd(1.0),
        )  # fmt: skip

    return size(params, batch)


def close(found, expected, tolerance=1e-9):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            one, other, rtol=tolerance, atol=1e-12
        ),
        found, expected,
    )  # fmt: skip


def check_training():
    jax.config.update("jax_enable_x64", True)
    plain = shapes("float64")
    architecture = archscale.trace(transformer, plain, tokens())
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        archscale.scale_by_architecture(architecture, archscale.dag_graph("2"), "path_sum"),
    )
    start = archscale.initialize(jax.random.key(0), plain, architecture)
    batches = [tokens()] * 3
    losses, end = train(transformer, start, tx, batches)
    size = measure(transformer, start, tokens())
    assert losses[2] < losses[0]
    structs = sharded(mesh_of(), plain)
    scale = archscale.scale_by_architecture(architecture, architecture, "path_sum")
    lowered = jax.jit(scale.update).lower(structs, optax.EmptyState())
    nothing_whole(lowered.compile(), jax.tree.leaves(structs))

    for kind, apply in (("auto", constrained), ("explicit", explicit)):
        mesh = mesh_of(kind)
        structs = sharded(mesh, plain)
        rows = NamedSharding(mesh, P("data"))
        with jax.set_mesh(mesh):
            born = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, structs))
            scaled, _ = jax.jit(tx.update)(born, tx.init(born))
            equal(scaled, jax.device_get(jax.jit(tx.update)(start, tx.init(start))[0]), SPECS)
            placed = [jax.device_put(batch, rows) for batch in batches]
            if kind == "auto":
                close(measure(apply, born, placed[0]), size)
                continue
            found, trained = train(apply, born, tx, placed)
            close(found, losses)
            close(jax.device_get(trained), jax.device_get(end))


def test_training_and_measuring_give_the_same_numbers():
    on_devices(check_training)


def check_gradinit():
    jax.config.update("jax_enable_x64", True)
    specs = {name: spec for name, (_, spec) in LAYERS.items()}
    plain, mesh = layers("float64")[0], mesh_of()
    x = np.random.default_rng(0).normal(size=(6, 8, 16))
    structs, _ = layers("float64", mesh)

    def loss(params, batch):
        return jnp.mean(jnp.square(perceptron(params, batch) - 1))

    architecture = archscale.trace(perceptron, plain, x[0])
    key = jax.random.key(0)
    learned, record = archscale.gradinit(
        loss, archscale.initialize(key, plain, architecture), list(x), max_gradient_norm=2.45
    )
    assert set(record.constrained) == {False, True}  # both programs ran
    rows = NamedSharding(mesh, P("data"))
    found, other = archscale.gradinit(
        loss, archscale.initialize(key, structs, architecture),
        [jax.device_put(batch, rows) for batch in x], max_gradient_norm=2.45,
    )  # fmt: skip
    close(jax.device_get(found), jax.device_get(learned))
    close(other, record)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim)


def test_gradinit_learns_the_same_scales():
    on_devices(check_gradinit)
