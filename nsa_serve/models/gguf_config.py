"""GGUF's metadata keys and tensor names, translated to those of config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .gguf_file import TensorEntry

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# llama.cpp's converter reorders the rows of q and k of this family, so that pairs are adjacent.
PERMUTED = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Written by converters, of no effect on the forward pass of the architectures above.
_HARMLESS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier",
)


def hf_tensor_name(name: str) -> str:
    """The safetensors name of a GGUF tensor, or the name itself where it is unknown."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def gguf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorEntry], path: Path
) -> dict[str, Any]:
    """The keys of config.json, from a GGUF file's metadata and the tensors it holds."""
    arch = str(metadata.get("general.architecture"))
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{path}: general.architecture {arch!r} is not supported; known: {known}"
        )
    _refuse_unknown(metadata, arch, path)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: token_embd.weight is missing")

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in metadata:
            raise CheckpointError(f"{path}: {arch}.{key} is missing")
        return metadata[f"{arch}.{key}"]

    heads = need("attention.head_count")
    config = {
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, arch, path) or need("embedding_length") // heads,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get(f"{arch}.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if arch != "qwen2":
        # Qwen2 always has biases; the others say so only by having them.
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    scaling = _rope_factors(tensors) or _rope_scaling(metadata, arch, path)
    return config if scaling is None else config | {"rope_scaling": scaling}


def gguf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The stop tokens of a GGUF file, under generation_config.json's keys."""
    ends = [
        metadata[f"tokenizer.ggml.{key}"]
        for key in ("eos_token_id", "eot_token_id")
        if f"tokenizer.ggml.{key}" in metadata
    ]
    return {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}


def _refuse_unknown(metadata: Mapping[str, Any], arch: str, path: Path) -> None:
    known = {f"{arch}.{key}" for key in _HARMLESS}
    for key, value in metadata.items():
        if key.startswith(f"{arch}.") and key not in known:
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported")


def _head_dim(metadata: Mapping[str, Any], arch: str, path: Path) -> int | None:
    k = metadata.get(f"{arch}.attention.key_length")
    v = metadata.get(f"{arch}.attention.value_length")
    rotary = metadata.get(f"{arch}.rope.dimension_count")
    if k is not None and v is not None and k != v:
        raise CheckpointError(f"{path}: key_length {k} and value_length {v} differ")
    if None not in (k, rotary) and k != rotary:
        raise CheckpointError(f"{path}: {arch}.rope.dimension_count {rotary} is not the head's {k}")
    return k or rotary


def _rope_factors(tensors: Mapping[str, TensorEntry]) -> dict[str, Any] | None:
    """llama3's scaling: the converter stores what each inverse frequency is divided by."""
    entry = tensors.get(ROPE_FACTORS)
    if entry is None:
        return None
    if entry.dtype != "F32":
        raise CheckpointError(f"{entry.file}: {ROPE_FACTORS} is {entry.dtype}, not F32")
    factors = np.fromfile(entry.file, "<f4", entry.num_bytes // 4, offset=entry.offset)
    return {"rope_type": "factors", "factors": factors.tolist()}


def _rope_scaling(metadata: Mapping[str, Any], arch: str, path: Path) -> dict[str, Any] | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: {arch}.rope.scaling.type {kind!r} is not supported")
    scaling = {"rope_type": kind, "factor": metadata.get(f"{arch}.rope.scaling.factor", 1.0)}
    original = metadata.get(f"{arch}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling
