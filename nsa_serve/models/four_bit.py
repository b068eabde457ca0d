"""Weights in groups of 4-bit numbers, as GGUF files store them, multiplied on a CPU as they are.

A product of few rows is bound by reading the weights, and these are a third of their bf16 size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor

GROUP = 32  # neighbours in a row that share a scale and an offset
_ROWS = 16  # torch's product takes a multiple of so many rows
# A block is fp16 numbers, then 16 bytes: low halves are values 0 … 15, high halves 16 … 31.
_HEAD_BYTES = {"Q4_0": 2, "Q4_1": 4}


@dataclass(frozen=True, slots=True)
class FourBitRows:
    """w[n, k] = (q[n, k] − 8) · scale + offset, of N rows."""

    q: Tensor  # [N, K] uint8, 0 … 15
    scales: Tensor  # [N, K/32, 2] fp32: scale, offset

    def dequantised(self) -> Tensor:
        """The weight [N, K] fp32."""
        scale, offset = self.scales.repeat_interleave(GROUP, dim=1).unbind(-1)
        return (self.q.float() - 8) * scale + offset


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """Rows in the order that torch's CPU product reads, scales and offsets rounded to bf16."""

    packed: Tensor  # [N, K/2] uint8
    scales: Tensor  # [K/32, N, 2] bf16: scale, offset

    @classmethod
    def of(cls, parts: Sequence[FourBitRows]) -> FourBitWeight:
        """The rows of ``parts``, one after the other."""
        q = torch.cat([part.q for part in parts])
        scales = torch.cat([part.scales for part in parts]).transpose(0, 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
        return cls(packed, scales.bfloat16().contiguous())

    def product(self, x: Tensor) -> Tensor:
        """``x`` [T, K] bf16 → x · wᵀ [T, N], sums in fp32, rounded once."""
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, GROUP, self.scales
        )
        return found


def packed_bytes(num_rows: int, width: int) -> int:
    """Bytes of a ``FourBitWeight`` [N, K]: half a byte a number, four bytes a group."""
    return num_rows * width // 2 + num_rows * width // GROUP * 4


def four_bit_rows(raw: NDArray[np.uint8], kind: str, shape: tuple[int, ...]) -> FourBitRows:
    """The blocks ``raw`` of a GGUF tensor [N, K] of ``kind`` Q4_0 or Q4_1."""
    rows, width = shape
    head = _HEAD_BYTES[kind]
    blocks = raw.reshape(rows, width // GROUP, head + GROUP // 2)
    numbers = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
    scale = numbers[..., 0]
    # Q4_0 counts from −8, Q4_1 from a minimum of its own.
    offset = numbers[..., 1] + 8 * scale if kind == "Q4_1" else np.zeros_like(scale)
    q = np.concatenate([blocks[..., head:] & 15, blocks[..., head:] >> 4], axis=-1)
    scales = torch.from_numpy(np.stack([scale, offset], axis=-1))
    return FourBitRows(torch.from_numpy(q.reshape(rows, width)), scales)


def is_four_bit(kind: str) -> bool:
    """Whether a GGUF tensor of this type is read by ``four_bit_rows``."""
    return kind in _HEAD_BYTES


def fits_product(num_rows: int) -> bool:
    """Whether torch's product takes a weight of so many rows."""
    return num_rows % _ROWS == 0


def has_four_bit_product() -> bool:
    """Whether this build of torch has a fast product of 4-bit weights for this CPU."""
    names = ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and all(hasattr(torch.ops.aten, name) for name in names)
