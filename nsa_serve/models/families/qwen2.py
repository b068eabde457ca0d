"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, none on o."""

from __future__ import annotations

from ..config import ModelConfig
from .options import Options, transformer_fields


def read(options: Options) -> ModelConfig:
    """A ``sliding_window`` is refused only where ``use_sliding_window`` turns it on."""
    if not options.flag("use_sliding_window"):
        options.get("sliding_window")
    if not options.flag("attention_bias", default=True):
        raise options.refusal("attention_bias", False)
    return ModelConfig(family="qwen2", qkv_bias=True, **transformer_fields(options))
