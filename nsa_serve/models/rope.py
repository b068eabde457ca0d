"""Rotary embedding: inverse frequencies of every scaling kind in the field, and a step's angles.

Formulas: default (arXiv 2104.09864), linear (2306.15595), dynamic NTK, yarn (2309.00071), longrope
(2402.13753), llama3 (Llama 3.1's release).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CheckpointError
from .config import RopeConfig

_Frequencies = tuple[torch.Tensor, float]


class Rotary:
    """cos and sin of a step's positions, computed once a step for all layers."""

    def __init__(self, inv_freq: torch.Tensor, scale: float) -> None:
        self.inv_freq = inv_freq  # [Dr/2] fp32
        self.scale = scale

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, Dr/2] fp32 of ``positions`` [T], times yarn's or longrope's factor."""
        angles = positions.to(torch.float32)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)


def build_rotary(rope: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> Rotary:
    """The rotary embedding of heads of ``head_dim`` for contexts of up to ``max_len`` tokens."""
    inv_freq, scale = inverse_frequencies(rope, head_dim, max_len)
    return Rotary(inv_freq.to(device), scale)


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_len: int) -> _Frequencies:
    """Inverse frequencies [Dr/2] fp32, and the factor on cos and sin.

    ``max_len`` fixes what depends on the length (dynamic, longrope) once, at load: frequencies that
    changed with a request's length would not fit the keys that are in the cache already.
    Raises ``CheckpointError`` for an unknown kind or a missing option.
    """
    if rope.kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise CheckpointError(f"rope_type {rope.kind!r} is not supported; known: {known}")
    return _KINDS[rope.kind](rope, rope.rotary_dim or head_dim, max_len)


def _default(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    return _powers(rope.theta, dim).reciprocal(), 1.0


def _linear(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    return _powers(rope.theta, dim).reciprocal() / _number(rope, "factor"), 1.0


def _dynamic(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    factor, original = _number(rope, "factor"), _original(rope)
    length = max(max_len, original)
    stretch = factor * length / original - (factor - 1)
    return _powers(rope.theta * stretch ** (dim / (dim - 2)), dim).reciprocal(), 1.0


def _factors(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    """llama3 as GGUF stores it: what each frequency is divided by."""
    return 1.0 / (_vector(rope, "factors", dim) * _powers(rope.theta, dim)), 1.0


def _llama3(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    factor, original = _number(rope, "factor"), _original(rope)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    inv_freq = _powers(rope.theta, dim).reciprocal()
    wavelength = 2 * math.pi / inv_freq
    # 0 where a turn is longer than original / low, 1 where it is shorter than original / high.
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq, 1.0


def _yarn(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    factor, original = _number(rope, "factor"), _original(rope)
    powers = _powers(rope.theta, dim)
    low = _yarn_dimension(rope.options.get("beta_fast") or 32, rope.theta, dim, original)
    high = _yarn_dimension(rope.options.get("beta_slow") or 1, rope.theta, dim, original)
    if rope.options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    inv_freq = interpolated / (factor * powers) + (1 - interpolated) / powers
    return inv_freq, _yarn_scale(rope, factor)


def _yarn_dimension(rotations: float, theta: float, dim: int, original: int) -> float:
    """The dimension that turns ``rotations`` times within the original context."""
    return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_scale(rope: RopeConfig, factor: float) -> float:
    given = rope.options.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = rope.options.get("mscale"), rope.options.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: RopeConfig, dim: int, max_len: int) -> _Frequencies:
    original = _original(rope)
    key = "long_factor" if max_len > original else "short_factor"
    inv_freq = 1.0 / (_vector(rope, key, dim) * _powers(rope.theta, dim))
    given, factor = rope.options.get("attention_factor"), _number(rope, "factor")
    if given is not None:
        return inv_freq, float(given)
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


_KINDS: dict[str, Callable[[RopeConfig, int, int], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "factors": _factors,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _powers(theta: float, dim: int) -> torch.Tensor:
    """theta^(2j / dim) of every pair j, [dim/2] fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return torch.pow(torch.tensor(theta, dtype=torch.float32), exponents)


def _number(rope: RopeConfig, key: str) -> float:
    return float(_option(rope, key))


def _vector(rope: RopeConfig, key: str, dim: int) -> torch.Tensor:
    values = torch.tensor(_option(rope, key), dtype=torch.float32)
    if values.shape != (dim // 2,):
        raise CheckpointError(
            f"rope_scaling.{key} has {values.numel()} numbers, the heads need {dim // 2}"
        )
    return values


def _option(rope: RopeConfig, key: str) -> Any:
    value = rope.options.get(key)
    if value is None:
        raise CheckpointError(f"rope_scaling of type {rope.kind!r} lacks {key}")
    return value


def _original(rope: RopeConfig) -> int:
    if rope.original_max_position is None:
        raise CheckpointError(
            f"rope_scaling of type {rope.kind!r} lacks original_max_position_embeddings"
        )
    return rope.original_max_position
