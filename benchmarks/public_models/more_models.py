"""Policies of brax, a flow of distrax, layers of haliax, a neural differential equation."""

# Its packages are in an environment of its own.
# pyright: reportMissingImports=false

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.public_models.subject import Build, Subject, floats


def _brax(kind: str) -> Build:
    """The networks of proximal policy optimization; their modules are made by its builders."""

    def build(size: str) -> Subject:
        from brax.training import networks

        width, depth = (256, 4) if size == "real" else (32, 2)
        layers = (width,) * depth
        if kind == "policy":
            network: Any = networks.make_policy_network(12, 8, hidden_layer_sizes=layers)
        else:
            network = networks.make_value_network(8, hidden_layer_sizes=layers)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return Subject(lambda params, x: network.apply(None, params, x), (floats(16, 8),), shapes)

    return build


def _distrax(size: str) -> Subject:
    """Masked couplings with conditioners of Haiku, as in the package's example."""
    import distrax

    dimension, width = (16, 512) if size == "real" else (4, 32)

    def log_density(x: jax.Array) -> jax.Array:
        mask = jnp.arange(dimension) % 2 == 0
        bijectors = []
        for _ in range(2):
            conditioner = hk.Sequential(
                [
                    hk.nets.MLP([width, width], activate_final=True),
                    hk.Linear(2 * dimension),
                    hk.Reshape((dimension, 2), preserve_dims=-1),
                ]
            )
            bijectors.append(
                distrax.MaskedCoupling(
                    mask=mask,
                    bijector=lambda p: distrax.ScalarAffine(p[..., 0], log_scale=p[..., 1]),
                    conditioner=conditioner,
                )
            )
            mask = ~mask
        base = distrax.MultivariateNormalDiag(jnp.zeros(dimension), jnp.ones(dimension))
        flow = distrax.Inverse(distrax.Chain(bijectors))
        return distrax.Transformed(base, flow).log_prob(x)

    return Subject(hk.without_apply_rng(hk.transform(log_density)), (floats(8, dimension),))


def _haliax(size: str) -> Subject:
    import equinox as eqx
    import haliax as hax

    width = 1024 if size == "real" else 32
    inputs, hidden, classes = hax.make_axes(I=16, H=width, C=10)
    batch = hax.Axis("batch", 8)

    def make(key: Any) -> Any:
        one, two = jax.random.split(key)
        return (
            hax.nn.MLP.init(inputs, hidden, width, 3, key=one),
            hax.nn.LayerNorm.init(hidden),
            hax.nn.Linear.init(hidden, classes, key=two),
        )

    params, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.PRNGKey(0)), lambda leaf: hasattr(leaf, "dtype")
    )

    def apply(params: Any, x: jax.Array) -> jax.Array:
        mlp, norm, head = eqx.combine(params, static)
        return head(hax.nn.gelu(norm(mlp(hax.named(x, (batch, inputs)))))).array

    return Subject(apply, (floats(8, 16),), params)


def _neural_ode(size: str) -> Subject:
    """The solver of diffrax around a field of Equinox; its steps are a while loop."""
    import diffrax
    import equinox as eqx

    class Field(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, t: Any, y: jax.Array, arguments: Any) -> jax.Array:
            del t, arguments
            return self.mlp(y)

    class Model(eqx.Module):
        field: Field

        def __call__(self, y: jax.Array) -> jax.Array:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(self.field), diffrax.Tsit5(), 0.0, 1.0, 0.1, y
            ).ys[-1]  # pyright: ignore

    width = 256 if size == "real" else 32
    model = eqx.filter_eval_shape(
        lambda key: Model(Field(eqx.nn.MLP(4, 4, width, 2, key=key))), jax.random.PRNGKey(0)
    )
    return Subject(model, (floats(4),))


MODELS: dict[str, Build] = {
    "brax policy": _brax("policy"),
    "brax value": _brax("value"),
    "distrax coupling flow": _distrax,
    "haliax MLP": _haliax,
    "diffrax neural ODE": _neural_ode,
}
