"""What we are measured against, given the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch

from ..config import ModelSource
from ..models.checkpoint import resolve

_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_llama(dtype: torch.dtype) -> Any:
    """The embedded model as transformers' ``LlamaForCausalLM``, weights dequantised from the GGUF.

    Written against the file alone and not through our loader, so that it is a yardstick for the
    loader too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = resolve(ModelSource())
    c = checkpoint.config
    config = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        max_position_embeddings=c["max_position_embeddings"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}
    state = dict(_llama_tensors(str(checkpoint.path), heads))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval()


def _llama_tensors(path: str, heads: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] in top:
            yield f"{top[parts[0]]}.weight", torch.from_numpy(np.array(weight))
            continue
        _, layer, part = parts
        if part in heads:
            weight = _half_rotation(weight, heads[part])
        name = f"model.layers.{layer}.{_LLAMA_NAMES[part]}.weight"
        yield name, torch.from_numpy(np.array(weight))


def _half_rotation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: from neighbours paired by RoPE to halves paired."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)
