"""Qwen3: Llama with RMSNorm over each head of q and k, and heads of 128 by default."""

from __future__ import annotations

from ..config import ModelConfig
from .options import Options, transformer_fields


def read(options: Options) -> ModelConfig:
    """A ``sliding_window`` is refused only where ``use_sliding_window`` turns it on."""
    if not options.flag("use_sliding_window"):
        options.get("sliding_window")
    bias = options.flag("attention_bias")
    fields = transformer_fields(options, head_dim=128)
    return ModelConfig(family="qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, **fields)
