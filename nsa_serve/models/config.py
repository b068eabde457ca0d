"""What a model is, whatever checkpoint format it came from. Families translate into this record."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..config import AttentionMode
from ..errors import ConfigError
from ..kernels.shapes import CompressKind, NSAShape


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. ``kind``: default, linear, dynamic, llama3, yarn or longrope."""

    theta: float = 10_000.0
    kind: str = "default"
    rotary_dim: int | None = None  # None: the whole head
    original_max_position: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the kind's own keys


@dataclass(frozen=True, slots=True)
class PhiConfig:
    """φ of keys or of values, as a checkpoint states it."""

    kind: CompressKind = CompressKind.MEAN
    position: bool = False  # an intra-block position embedding is added first
    shared: bool = False  # linear: one matrix for all heads
    rank: int | None = None  # linear: mean + low rank


@dataclass(frozen=True, slots=True)
class NSAConfig:
    """NSA as a checkpoint was trained with it, or training-free on a dense one (the defaults)."""

    shape: NSAShape = field(default_factory=NSAShape)
    phi_k: PhiConfig = field(default_factory=PhiConfig)
    phi_v: PhiConfig = field(default_factory=PhiConfig)
    before_rope: bool = False  # φ_k applies to unrotated keys
    gated: bool = False  # learned gates; False: fixed (0, 1, 0)
    gate_bias: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind: RMSNorm, RoPE, GQA, SwiGLU."""

    family: str  # llama, qwen2, qwen3 or nsa_serve
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # per-head RMSNorm of q and k (Qwen3)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    nsa: NSAConfig | None = None  # None: dense attention

    @property
    def group_size(self) -> int:
        """Query heads per KV head, G."""
        return self.num_q_heads // self.num_kv_heads


def with_attention(config: ModelConfig, mode: AttentionMode) -> ModelConfig:
    """``config`` as ``--attention`` serves it.

    A dense checkpoint served as NSA gets mean pooling and fixed gates: equal to its dense self up
    to n·P tokens, untrained beyond. Raises ``ConfigError`` for a checkpoint with learned gates
    served dense, since its weights mean nothing without its other branches.
    """
    if mode is AttentionMode.NSA:
        return config if config.nsa is not None else replace(config, nsa=NSAConfig())
    if mode is AttentionMode.DENSE and config.nsa is not None:
        if config.nsa.gated:
            raise ConfigError(
                "--attention dense can't serve a checkpoint trained with gated NSA; use auto or nsa"
            )
        return replace(config, nsa=None)
    return config


def with_context(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    """``config`` for contexts of ``max_model_len`` tokens (None: all the checkpoint can do).

    Raises ``ConfigError`` where the checkpoint's positions end before.
    """
    if max_model_len is None:
        return config
    if max_model_len > config.max_position:
        raise ConfigError(
            f"--max-model-len {max_model_len} exceeds the checkpoint's context of "
            f"{config.max_position} tokens"
        )
    return replace(config, max_position=max_model_len)
