"""Flax models of transformers 4.57."""

# Its packages are in an environment of its own.
# pyright: reportMissingImports=false

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax.core import unfreeze

from archscale_jax._trees import map_with_names
from benchmarks.public_models.subject import Build, Sized, Subject, floats, tokens

_ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 17,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 64}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 17,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 17}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_GROUPED = {**_ENCODER, "num_key_value_heads": 1, "max_position_embeddings": 64}

_TEXT = {"input_ids": tokens(2, 16)}
_PAIR = {**_TEXT, "decoder_input_ids": tokens(2, 8)}
_IMAGE = {"pixel_values": floats(2, 3, 32, 32)}
_LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip

_MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # config, class, sizes of the small model, of the real one beside the defaults, inputs
    "GPT-2": ("GPT2Config", "FlaxGPT2LMHeadModel", _GPT, {}, _TEXT),
    "GPT-Neo": (
        "GPTNeoConfig", "FlaxGPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 17,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
         "window_size": 8}, {}, _TEXT),
    "GPT-J": ("GPTJConfig", "FlaxGPTJForCausalLM", {**_GPT, "rotary_dim": 8}, {}, _TEXT),
    "Llama (8B, grouped keys)": (
        "LlamaConfig", "FlaxLlamaForCausalLM", _GROUPED, _LLAMA_8B, _TEXT),
    "Mistral": (  # it makes a mask of all positions, at the default 17 GB
        "MistralConfig", "FlaxMistralForCausalLM", _GROUPED, {"max_position_embeddings": 4096},
        _TEXT),
    "Gemma": ("GemmaConfig", "FlaxGemmaForCausalLM", {**_GROUPED, "head_dim": 16}, {}, _TEXT),
    "OPT": (
        "OPTConfig", "FlaxOPTForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
         "vocab_size": 17, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, {}, _TEXT),
    "BLOOM": (
        "BloomConfig", "FlaxBloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 17},
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16}, _TEXT),
    "XGLM": (
        "XGLMConfig", "FlaxXGLMForCausalLM",
        {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64, "vocab_size": 17,
         "max_position_embeddings": 64}, {}, _TEXT),
    "BERT, masked words": ("BertConfig", "FlaxBertForMaskedLM", _ENCODER, {}, _TEXT),
    "BERT, classifier": ("BertConfig", "FlaxBertForSequenceClassification", _ENCODER, {}, _TEXT),
    "RoBERTa": ("RobertaConfig", "FlaxRobertaForMaskedLM", _ENCODER, {}, _TEXT),
    "RoBERTa, pre-LN": (
        "RobertaPreLayerNormConfig", "FlaxRobertaPreLayerNormForMaskedLM", _ENCODER, {}, _TEXT),
    "XLM-RoBERTa": ("XLMRobertaConfig", "FlaxXLMRobertaForMaskedLM", _ENCODER, {}, _TEXT),
    "RoFormer": ("RoFormerConfig", "FlaxRoFormerForMaskedLM", _ENCODER, {}, _TEXT),
    "ELECTRA": (
        "ElectraConfig", "FlaxElectraForMaskedLM", {**_ENCODER, "embedding_size": 32}, {}, _TEXT),
    "ALBERT": (
        "AlbertConfig", "FlaxAlbertForMaskedLM", {**_ENCODER, "embedding_size": 16}, {}, _TEXT),
    "DistilBERT": (
        "DistilBertConfig", "FlaxDistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 17}, {}, _TEXT),
    "BigBird": (
        "BigBirdConfig", "FlaxBigBirdForMaskedLM",
        {**_ENCODER, "attention_type": "original_full"}, {"attention_type": "original_full"},
        _TEXT),
    "T5, encoder": ("T5Config", "FlaxT5EncoderModel", _T5, {}, _TEXT),
    "T5": ("T5Config", "FlaxT5ForConditionalGeneration", _T5, {}, _PAIR),
    "BART": ("BartConfig", "FlaxBartForConditionalGeneration", _BART, {}, _PAIR),
    "mBART": ("MBartConfig", "FlaxMBartForConditionalGeneration", _BART, {}, _PAIR),
    "Pegasus": ("PegasusConfig", "FlaxPegasusForConditionalGeneration", _BART, {}, _PAIR),
    "Marian": ("MarianConfig", "FlaxMarianMTModel", _BART, {}, _PAIR),
    "Blenderbot": ("BlenderbotConfig", "FlaxBlenderbotForConditionalGeneration", _BART, {}, _PAIR),
    "Blenderbot, small": (
        "BlenderbotSmallConfig", "FlaxBlenderbotSmallForConditionalGeneration", _BART, {}, _PAIR),
    "ViT": ("ViTConfig", "FlaxViTForImageClassification", _VIT, {}, _IMAGE),
    "BEiT": ("BeitConfig", "FlaxBeitForImageClassification", _VIT, {}, _IMAGE),
    "DINOv2": ("Dinov2Config", "FlaxDinov2ForImageClassification", _VIT, {}, _IMAGE),
    "CLIP, images": ("CLIPVisionConfig", "FlaxCLIPVisionModel", _VIT, {}, _IMAGE),
    "CLIP, text": (
        "CLIPTextConfig", "FlaxCLIPTextModel", {**_ENCODER, "max_position_embeddings": 64}, {},
        _TEXT),
    "CLIP": (
        "CLIPConfig", "FlaxCLIPModel",
        {"text_config": {**_ENCODER, "max_position_embeddings": 64, "eos_token_id": 2},
         "vision_config": _VIT, "projection_dim": 16}, {}, {**_TEXT, **_IMAGE}),
    "ResNet": (
        "ResNetConfig", "FlaxResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}, {}, _IMAGE),
    "RegNet": (
        "RegNetConfig", "FlaxRegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}, {},
        _IMAGE),
    "wav2vec 2.0": (
        "Wav2Vec2Config", "FlaxWav2Vec2ForCTC",
        {**_ENCODER, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
         "feat_extract_norm": "layer"},
        {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        {"input_values": floats(2, 400)}),
    "Whisper": (
        "WhisperConfig", "FlaxWhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
         "suppress_tokens": None, "begin_suppress_tokens": None}, {},
        {"input_features": floats(2, 8, 32), "decoder_input_ids": tokens(2, 8)}),
}  # fmt: skip

_REAL_INPUTS: dict[str, Any] = {
    "pixel_values": floats(2, 3, 224, 224),
    "input_features": floats(2, 80, 3000),
    "input_values": floats(2, 16000),
}


def _build(
    name: str, size: str, widths: Mapping[str, Any] | None = None, **options: Any
) -> Subject:
    """A model, small or real, or with other widths than the small one."""
    config_class, model_class, small, real, inputs = _MODELS[name]
    sizes = real if size == "real" else {**small, **(widths or {})}
    config = getattr(transformers, config_class)(**sizes)
    model = getattr(transformers, model_class)(config, _do_init=False)
    shapes = unfreeze(model.params_shape_tree)
    given = {
        key: _REAL_INPUTS.get(key, one) if size == "real" else one for key, one in inputs.items()
    }
    stateful = "batch_stats" in shapes
    params = shapes["params"] if stateful else shapes

    def apply(params: Any, *arrays: jax.Array) -> jax.Array:
        if stateful:
            averages = map_with_names(
                lambda leaf, one: (jnp.zeros if leaf.endswith("mean") else jnp.ones)(one.shape),
                shapes["batch_stats"],
            )
            variables = {"params": params, "batch_stats": averages}
            outputs = model(*arrays, params=variables, train=True)[0]
        else:
            outputs = model(**dict(zip(given, arrays, strict=True)), params=params)
        return next(
            (outputs[key] for key in ("logits", "logits_per_image") if key in outputs), outputs[0]
        )

    return Subject(apply, tuple(given.values()), params, **options)


MODELS: dict[str, Build] = {name: lambda size, name=name: _build(name, size) for name in _MODELS}


# Widths in units of 64, heads of 16 features, one token or image of every example predicted.
_WIDTHS: dict[str, dict[str, int]] = {
    "GPT-2": {"n_embd": 64, "n_head": 4},
    "Llama (8B, grouped keys)": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2},
    "Gemma": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 1},
    "BART": {
        "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    "ViT": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}  # fmt: skip


def _sized(name: str, ratio: int) -> Subject:
    widths = {key: size * ratio for key, size in _WIDTHS[name].items()}
    if name == "ViT":
        return _build(name, "small", {**widths, "num_labels": 10}, classes=True)
    last: Any = lambda logits: logits[:, -1]  # noqa: E731
    return _build(name, "small", widths, outputs=last, classes=True)


SIZED: dict[str, Sized] = {name: lambda ratio, name=name: _sized(name, ratio) for name in _WIDTHS}
