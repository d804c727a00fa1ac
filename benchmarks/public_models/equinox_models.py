"""Equinox models of equimo and jaxonmodels, flows of flowjax."""

# Its packages are in an environment of its own.
# pyright: reportMissingImports=false

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from benchmarks.public_models.subject import Build, Sized, Subject, floats, tokens

KEY = jax.random.PRNGKey(0)


def _shapes(make: Callable[..., Any]) -> Any:
    return eqx.filter_eval_shape(make, KEY)


def _equimo(name: str, side: int, small: dict[str, Any], real: dict[str, Any] | None) -> Build:
    def build(size: str) -> Subject:
        import equimo.models

        given = copy.deepcopy(real if size == "real" and real is not None else small)
        make = getattr(equimo.models, name)
        model = _shapes(lambda key: make(in_channels=3, num_classes=10, key=key, **given))
        length = given.get("img_size", side)
        keywords = {"key": KEY, "inference": False}
        return Subject(model, (floats(3, length, length),), options={"model_kwargs": keywords})

    return build


def _mamba(size: str) -> Subject:
    from jaxonmodels.models.mamba import Mamba

    sizes = {"n_embd": 768, "n_dims": 50280, "n_layers": 24} if size == "real" else {
        "n_embd": 32, "n_dims": 16, "n_layers": 2}  # fmt: skip
    model = _shapes(lambda key: Mamba(**sizes, key=key))
    return Subject(model, (tokens(16),), vocabulary=16)


def _clip_vision(size: str) -> Subject:
    from jaxonmodels.models.vit import VisionTransformer

    sizes = {"input_resolution": 224, "patch_size": 32, "width": 768, "layers": 12, "heads": 12}
    if size != "real":
        sizes = {"input_resolution": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    model = _shapes(lambda key: VisionTransformer(**sizes, output_dim=16, key=key))
    side = sizes["input_resolution"]
    return Subject(model, (floats(3, side, side),), outputs=lambda out: out[0])


def _flow(name: str) -> Build:
    def build(size: str) -> Subject:
        import flowjax.distributions
        import flowjax.flows

        make = getattr(flowjax.flows, name)
        dimension, width = (16, 256) if size == "real" else (4, 32)

        def flow(key: jax.Array) -> Any:
            normal = flowjax.distributions.StandardNormal((dimension,))
            return make(key, base_dist=normal, nn_width=width, flow_layers=2)

        params, static = eqx.partition(flow(KEY), eqx.is_inexact_array)

        def apply(params: Any, x: jax.Array) -> jax.Array:
            import paramax

            return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

        shapes = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), params)
        return Subject(apply, (floats(8, dimension),), shapes)

    return build


def _mlp(size: str) -> Subject:
    width, depth = (4096, 8) if size == "real" else (32, 2)
    model = _shapes(lambda key: eqx.nn.MLP(16, 10, width, depth, key=key))
    return Subject(model, (floats(16),))


_STAGES = {"depths": [1, 1, 1, 1]}
MODELS: dict[str, Build] = {
    "equimo ViT": _equimo(
        "VisionTransformer", 32,
        {"img_size": 32, "dim": 32, "patch_size": 8, "num_heads": [2], "depths": [2]},
        {"img_size": 224, "dim": 768, "patch_size": 16, "num_heads": [12], "depths": [12]}),
    "equimo ConvNeXt": _equimo(
        "ConvNeXt", 32, {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}, {}),
    "equimo MLLA": _equimo(
        "Mlla", 64, {"img_size": 64, "dim": 16, "num_heads": [1, 2, 4, 8], **_STAGES},
        {"img_size": 224}),
    "equimo VSSD": _equimo(
        "Vssd", 64,
        {"img_size": 64, "dim": 16, "d_state": 8, "num_heads": [1, 2, 4, 8], **_STAGES},
        {"img_size": 224}),
    "equimo LowFormer": _equimo(
        "LowFormer", 64,
        {"widths": [8, 16, 32, 32, 64], "depths": [1] * 5, "att_strides": [1] * 5,
         "block_types": ["conv", "conv", "conv", "attention", "attention"],
         "attention_type": "softmax"}, None),
    "equimo SHViT": _equimo(
        "SHViT", 128, {"dim": [16, 32, 48], "pdim": [8, 8, 16], "qk_dim": [8] * 3,
                       "depths": [1, 1, 1]}, {}),
    "equimo PartialFormer": _equimo(
        "PartialFormer", 224,
        {"img_size": 224, "dim": 16, "num_heads": [1, 2, 4, 4], "foreground_ratios": 0.5,
         **_STAGES},
        None),
    "equimo MobileNetV3": _equimo(
        "MobileNetv3", 32,
        {"layers_config": [(3, 16, 16, 1, True, "relu"), (3, 32, 24, 2, False, "hard_swish")],
         "last_channels": 64}, None),
    "jaxonmodels CLIP ViT": _clip_vision,
    "jaxonmodels Mamba": _mamba,
    "equinox MLP": _mlp,
    "flowjax masked autoregressive flow": _flow("masked_autoregressive_flow"),
    "flowjax coupling flow": _flow("coupling_flow"),
}  # fmt: skip


def _sized_mamba(ratio: int) -> Subject:
    from jaxonmodels.models.mamba import Mamba

    model = Mamba(n_embd=64 * ratio, n_dims=16, n_layers=2, key=KEY)  # arrays: it keeps its decays
    return Subject(model, (tokens(8),), vocabulary=16, outputs=lambda out: out[-1:], classes=True)


SIZED: dict[str, Sized] = {"jaxonmodels Mamba": _sized_mamba}
