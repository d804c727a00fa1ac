"""dm-haiku's networks, diffusion models of flaxdiff and diffusers, Mamba 2 in JAX."""

# Its packages are in an environment of its own.
# pyright: reportMissingImports=false

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.public_models.subject import Build, Sized, Subject, floats, tokens


def _haiku(make: Any, *inputs: jax.ShapeDtypeStruct, **keywords: Any) -> Subject:
    model = hk.transform_with_state(lambda *arrays: make()(*arrays, **keywords))
    return Subject(model, inputs)


def _resnet(make: Any, bottleneck: bool, *channels: int) -> Build:
    def build(size: str) -> Subject:
        if size == "real":
            return _haiku(lambda: make(1000), floats(2, 224, 224, 3), is_training=True)
        options = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": channels}
        return _haiku(
            lambda: hk.nets.ResNet(num_classes=10, bottleneck=bottleneck, **options),
            floats(4, 32, 32, 3), is_training=True,
        )  # fmt: skip

    return build


def _graph_network(size: str) -> Subject:
    """A graph convolution as in jraph's examples: nodes from their neighbours."""
    import jraph

    width, nodes, edges = (512, 64, 512) if size == "real" else (32, 8, 24)

    def network(features: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        graph = jraph.GraphsTuple(
            features, None, receivers, senders, None, jnp.array([nodes]), jnp.array([edges])
        )
        for _ in range(3):
            convolution = jraph.GraphConvolution(
                lambda values: jax.nn.relu(hk.Linear(width)(values)), add_self_edges=True
            )
            graph = convolution(graph)
        return hk.Linear(7)(graph.nodes)

    model = hk.without_apply_rng(hk.transform(network))
    return Subject(model, (floats(nodes, 16), tokens(edges), tokens(edges)), vocabulary=nodes)


def _mobilenet(size: str) -> Subject:
    if size == "real":
        return _haiku(
            lambda: hk.nets.MobileNetV1(num_classes=1000), floats(2, 224, 224, 3), is_training=True
        )
    return _haiku(
        lambda: hk.nets.MobileNetV1(strides=(1, 2), channels=(16, 32), num_classes=10),
        floats(4, 32, 32, 3), is_training=True,
    )  # fmt: skip


def _mlp(size: str) -> Subject:
    widths = [4096] * 8 + [10] if size == "real" else [32, 32, 10]
    return _haiku(lambda: hk.nets.MLP(widths), floats(8, 16))


def _mamba(size: str) -> Subject:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    small = {"vocab_size": 17, "hidden_size": 32, "state_size": 8, "head_dim": 16, "chunk_size": 8,
             "num_hidden_layers": 2}  # fmt: skip
    config = Mamba2Config(**({} if size == "real" else small))
    model = nnx.eval_shape(lambda: Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    ids = tokens(2, 256 if size == "real" else 16)
    return Subject(model, (ids,), outputs=lambda out: out["logits"])


def _flaxdiff(make: Any, side: int, *context: int) -> Subject:
    return Subject(make(), (floats(2, side, side, 3), floats(2), floats(2, *context)))


def _unet(size: str) -> Subject:
    from flaxdiff.models.simple_unet import Unet

    attention = {"heads": 2, "dtype": jnp.float32, "flash_attention": False}
    small = {"feature_depths": (16, 32), "attention_configs": (attention, attention),
             "emb_features": 32, "num_res_blocks": 1}  # fmt: skip
    return _flaxdiff(lambda: Unet(**({} if size == "real" else small)), 32, 7, 64)


def _dit(name: str, module: str) -> Build:
    def build(size: str) -> Subject:
        import importlib

        cls = getattr(importlib.import_module(f"flaxdiff.models.{module}"), name)
        small = {"patch_size": 8, "emb_features": 32, "num_layers": 2, "num_heads": 2}
        return _flaxdiff(lambda: cls(**({} if size == "real" else small)), 32, 7, 64)

    return build


def _diffusers_unet(size: str) -> Subject:
    from diffusers import FlaxUNet2DConditionModel

    small = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
             "attention_head_dim": 2, "in_channels": 4, "out_channels": 4}  # fmt: skip
    model = FlaxUNet2DConditionModel(**({} if size == "real" else small))
    side, width = (32, 1280) if size == "real" else (8, 32)
    shapes = jax.eval_shape(lambda key: model.init_weights(key), jax.random.key(0))

    def apply(params: Any, sample: jax.Array, times: jax.Array, context: jax.Array) -> jax.Array:
        return model.apply({"params": params}, sample, times, context).sample

    inputs = (floats(2, 4, side, side), tokens(2), floats(2, 7, width))
    return Subject(apply, inputs, shapes)


def _diffusers_vae(size: str) -> Subject:
    from diffusers import FlaxAutoencoderKL

    small = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16,
             "down_block_types": ("DownEncoderBlock2D",) * 2,
             "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    large = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
             "down_block_types": ("DownEncoderBlock2D",) * 4,
             "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    model = FlaxAutoencoderKL(**(large if size == "real" else small))
    shapes = jax.eval_shape(lambda key: model.init_weights(key), jax.random.key(0))
    side = 128 if size == "real" else 16

    def apply(params: Any, image: jax.Array) -> jax.Array:
        return model.apply({"params": params}, image).sample

    return Subject(apply, (floats(2, 3, side, side),), shapes)


def _controlnet(size: str) -> Subject:
    from diffusers import FlaxControlNetModel

    small = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "in_channels": 4,
             "cross_attention_dim": 32, "attention_head_dim": 2,
             "conditioning_embedding_out_channels": (16, 16, 16, 32)}  # fmt: skip
    model = FlaxControlNetModel(**({} if size == "real" else small))
    side, width = (32, 1280) if size == "real" else (8, 32)
    shapes = jax.eval_shape(lambda key: model.init_weights(key), jax.random.key(0))
    pixels = 8 * side

    def apply(params: Any, *inputs: jax.Array) -> jax.Array:
        found = model.apply({"params": params}, *inputs)
        parts = [*found.down_block_res_samples, found.mid_block_res_sample]
        return jnp.concatenate([one.reshape(2, -1) for one in parts], -1)

    inputs = (floats(2, 4, side, side), tokens(2), floats(2, 7, width),
              floats(2, 3, pixels, pixels))  # fmt: skip
    return Subject(apply, inputs, shapes)


def _sized_resnet(ratio: int) -> Subject:
    """All widths in units of 64, the first convolution's too."""

    def network(images: jax.Array) -> jax.Array:
        model = hk.nets.ResNet(
            (1, 1, 1, 1), 10, bottleneck=True,
            channels_per_group=tuple(ratio * size for size in (64, 64, 128, 128)),
            initial_conv_config={"output_channels": 64 * ratio, "kernel_shape": 3, "stride": 2},
        )  # fmt: skip
        return model(images, is_training=True)

    inputs = (floats(16, 32, 32, 3),)
    return Subject(hk.transform_with_state(network), inputs, classes=True)


def _sized_unet(ratio: int) -> Subject:
    """Of all predictions, nine a picture."""
    from flaxdiff.models.simple_unet import Unet

    attention = {"heads": 4 * ratio, "dtype": jnp.float32, "flash_attention": False}
    model = Unet(
        feature_depths=(64 * ratio, 128 * ratio), emb_features=64 * ratio, num_res_blocks=1,
        attention_configs=(attention, attention),
    )  # fmt: skip
    inputs = (floats(4, 8, 8, 3), floats(4), floats(4, 7, 64))
    return Subject(model, inputs, outputs=lambda out: out[:, 2::6, 2::6])


def _sized_mamba(ratio: int) -> Subject:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=17, hidden_size=64 * ratio, state_size=16, head_dim=16, chunk_size=8,
        num_hidden_layers=2,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return Subject(model, (tokens(4, 16),), outputs=lambda out: out["logits"][:, -1], classes=True)


SIZED: dict[str, Sized] = {
    "haiku ResNet-50": _sized_resnet,
    "flaxdiff U-Net": _sized_unet,
    "Mamba 2": _sized_mamba,
}
MODELS: dict[str, Build] = {
    "haiku MLP": _mlp,
    "haiku ResNet-18": _resnet(hk.nets.ResNet18, False, 8, 16, 16, 32),
    "haiku ResNet-50": _resnet(hk.nets.ResNet50, True, 16, 32, 32, 64),
    "haiku MobileNet": _mobilenet,
    "jraph graph convolution": _graph_network,
    "Mamba 2": _mamba,
    "flaxdiff U-Net": _unet,
    "flaxdiff DiT": _dit("SimpleDiT", "simple_dit"),
    "flaxdiff MM-DiT": _dit("SimpleMMDiT", "simple_mmdit"),
    "flaxdiff UViT": _dit("UViT", "simple_vit"),
    "flaxdiff U-DiT": _dit("SimpleUDiT", "simple_vit"),
    "flaxdiff SSM-DiT": _dit("HybridSSMAttentionDiT", "ssm_dit"),
    "diffusers U-Net": _diffusers_unet,
    "diffusers VAE": _diffusers_vae,
    "diffusers ControlNet": _controlnet,
}
