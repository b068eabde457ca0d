"""Llama and what shares its shape (SmolLM2, TinyLlama, Mistral without a window saved as Llama)."""

from __future__ import annotations

from ..config import ModelConfig
from .options import Options, transformer_fields


def read(options: Options) -> ModelConfig:
    """``attention_bias`` puts biases on q, k, v and o alike."""
    bias = options.flag("attention_bias")
    fields = transformer_fields(options)
    return ModelConfig(family="llama", qkv_bias=bias, o_bias=bias, **fields)
