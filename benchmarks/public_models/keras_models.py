"""Models of keras-hub on JAX."""

# Its packages are in an environment of its own.
# pyright: reportMissingImports=false

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp

from benchmarks.public_models.subject import Build, Sized, Subject, floats, tokens

_TEXT = {"token_ids": tokens(2, 16)}
_PAIR = {"encoder_token_ids": tokens(2, 16), "decoder_token_ids": tokens(2, 8)}
_IMAGE = {"images": floats(2, 32, 32, 3)}
_SIZES = {"vocabulary_size": 17, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}


def subject(model: Any, inputs: dict[str, jax.ShapeDtypeStruct], **options: Any) -> Subject:
    """A Keras model as a function of its trainable variables, in training."""
    names = [one.path for one in model.trainable_variables]
    params = {name: one.value for name, one in zip(names, model.trainable_variables, strict=True)}
    state = [one.value for one in model.non_trainable_variables]

    def apply(params: Any, *arrays: jax.Array) -> Any:
        given: Any = dict(zip(inputs, arrays, strict=True))
        for name in inputs:  # nothing is padded
            given[name.replace("token_ids", "padding_mask")] = jnp.ones(inputs[name].shape, "int32")
        given = given if len(model.inputs) > 1 else arrays[0]
        values = [params[name] for name in names]
        return model.stateless_call(values, state, given, training=True)[0]

    return Subject(apply, tuple(inputs.values()), params, **options)


def _with_logits(backbone: Any, key: str | None = None) -> Any:
    """A backbone with its token table as readout, as its language model calls it."""
    import keras

    features = backbone.output if key is None else backbone.output[key]
    return keras.Model(backbone.inputs, backbone.token_embedding(features, reverse=True))


def _backbone(name: str, **sizes: Any) -> Any:
    import keras_hub

    return getattr(keras_hub.models, name)(**sizes)


def _language(name: str, **sizes: Any) -> Build:
    def build(size: str) -> Subject:
        _only_small(size)
        return subject(_with_logits(_backbone(name, **_SIZES, **sizes)), _TEXT)

    return build


def _t5(hidden: int, heads: int, **options: Any) -> Subject:
    sizes = {**_SIZES, "hidden_dim": hidden, "intermediate_dim": 2 * hidden}
    model = _backbone("T5Backbone", **sizes, num_heads=heads, key_value_dim=16, dropout=0.0)
    return subject(_with_logits(model, "decoder_sequence_output"), _PAIR, **options)


def _gemma3(hidden: int, heads: int, **options: Any) -> Subject:
    sizes = {**_SIZES, "hidden_dim": hidden, "intermediate_dim": 2 * hidden}
    model = _backbone(
        "Gemma3Backbone", **sizes, image_size=16, num_query_heads=heads,
        num_key_value_heads=heads // 2, head_dim=16, use_post_ffw_norm=True,
        use_post_attention_norm=True,
    )  # fmt: skip
    return subject(_with_logits(model), _TEXT, **options)


def _siglip(hidden: int, heads: int, **options: Any) -> Subject:
    """The encoder of images, which ends in an attention pool, and a classifier."""
    import keras

    encoder = _backbone(
        "SigLIPVisionEncoder", patch_size=8, hidden_dim=hidden, num_layers=2, num_heads=heads,
        intermediate_dim=2 * hidden, image_shape=(32, 32, 3),
    )  # fmt: skip
    model = keras.Model(encoder.inputs, keras.layers.Dense(10)(encoder.output))
    return subject(model, _IMAGE, **options)


def _small(make: Callable[[int, int], Subject]) -> Build:
    def build(size: str) -> Subject:
        _only_small(size)
        return make(32, 2)

    return build


def _only_small(size: str) -> None:
    if size == "real":
        raise NotImplementedError("Keras makes arrays, no shapes")


MODELS: dict[str, Build] = {
    "keras-hub T5 1.1": _small(_t5),
    "keras-hub Gemma 3": _small(_gemma3),
    "keras-hub SigLIP, images": _small(_siglip),
    "keras-hub GPT-NeoX": _language("GPTNeoXBackbone", num_heads=2),
    "keras-hub Falcon": _language("FalconBackbone", num_attention_heads=2),
    "keras-hub Qwen 3": _language(
        "Qwen3Backbone", num_query_heads=2, num_key_value_heads=1, head_dim=16),
    "keras-hub Mixtral": _language(
        "MixtralBackbone", num_query_heads=2, num_key_value_heads=1, num_experts=4),
    "keras-hub DeBERTa 3": _language(
        "DebertaV3Backbone", num_heads=2, max_sequence_length=32, bucket_size=8),
}  # fmt: skip
_LAST: dict[str, Any] = {"outputs": lambda logits: logits[:, -1], "classes": True}
SIZED: dict[str, Sized] = {
    "keras-hub T5 1.1": lambda ratio: _t5(64 * ratio, 4 * ratio, **_LAST),
    "keras-hub Gemma 3": lambda ratio: _gemma3(64 * ratio, 4 * ratio, **_LAST),
    "keras-hub SigLIP, images": lambda ratio: _siglip(64 * ratio, 4 * ratio, classes=True),
}
