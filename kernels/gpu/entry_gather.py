"""Compressed entries of a step as prefill reads them: gathered once, or page by page.

A prompt's tiles read the same entries thousands of times, so a step first copies each row's
entries from their pages (by block id) into one contiguous run per KV head; tiles then come through
tensor descriptors. Where rows are many and their queries few the copy would cost more than it
saves, and tiles follow the block table instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..shapes import CompressedKV, NSAShape, StepBatch
from .query_tiles import num_visible

Tensor = torch.Tensor

# Entries that one program of the copy moves.
_COPY_ENTRIES = 64
# A row is copied when its step brings at least this many queries per row on average.
_MIN_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Entries:
    """Where tiles read entries from: ``k``/``v`` [B·Hkv, C, D] contiguous, or the paged pool."""

    k: Tensor
    v: Tensor
    paged: bool

    def operand(self, tensor: Tensor, tile: int, width: int) -> Any:
        """``tensor`` as a kernel takes it: a descriptor of [tile, width] boxes, or itself."""
        if self.paged:
            return tensor
        return TensorDescriptor.from_tensor(tensor, [1, tile, width])


def gather_entries(
    compressed: CompressedKV, batch: StepBatch, *, nsa: NSAShape, paged: bool | None = None
) -> Entries:
    """The step's entries, copied into [B·Hkv, C, D] where that pays (``paged`` overrides)."""
    if paged is None:
        paged = batch.num_tokens < _MIN_QUERIES * batch.num_rows
    if paged:
        return Entries(compressed.k, compressed.v, paged=True)
    num_entries = triton.cdiv(max(nsa.num_visible(batch.max_context_len - 1), 1), _COPY_ENTRIES)
    shape = (batch.num_rows * compressed.k.shape[1], num_entries * _COPY_ENTRIES)
    k = compressed.k.new_empty(*shape, compressed.k.shape[3])
    v = compressed.v.new_empty(*shape, compressed.v.shape[3])
    for pool, target in ((compressed.k, k), (compressed.v, v)):
        _gather_kernel[(num_entries, pool.shape[1], batch.num_rows)](
            pool,
            target,
            batch.block_table,
            batch.context_lens,
            shape[1],
            batch.block_table.stride(0),
            *pool.stride()[:3],
            HKV=pool.shape[1],
            D=pool.shape[3],
            BLOCK_D=triton.next_power_of_2(pool.shape[3]),
            BLOCK=_COPY_ENTRIES,
            L=nsa.compress_len,
            STRIDE=nsa.compress_stride,
            E=nsa.entries_per_page,
            num_warps=4,
        )
    return Entries(k, v, paged=False)


@triton.jit(do_not_specialize=["capacity", "table_stride"])
def _gather_kernel(
    pool_ptr,
    target_ptr,
    table_ptr,
    context_lens_ptr,
    capacity,
    table_stride,
    stride_b,
    stride_h,
    stride_e,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
):
    """Copy BLOCK entries of one row and KV head; zeros past the row's last entry."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    written = entries < num_visible(tl.load(context_lens_ptr + row) - 1, L, STRIDE)
    x = load_paged_entries(
        pool_ptr,
        table_ptr + row.to(tl.int64) * table_stride,
        entries + (L // STRIDE - 1),
        written,
        head,
        stride_b,
        stride_h,
        stride_e,
        D,
        BLOCK_D,
        E,
    )  # [BLOCK, BLOCK_D]
    dims = tl.arange(0, BLOCK_D)
    base = target_ptr + ((row * HKV + head).to(tl.int64) * capacity) * D
    # Zeros and not leftovers: a masked probability of 0 times a NaN would still be NaN.
    tl.store(base + entries[:, None] * D + dims[None, :], x, mask=dims[None, :] < D)


@triton.jit
def load_paged_entries(
    pool_ptr,
    row_table_ptr,
    slots,
    wanted,
    head,
    stride_b,
    stride_h,
    stride_e,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,
):
    """[len(slots), BLOCK_D] at ``slots`` of a row's run of pages; zeros where not ``wanted``."""
    blocks = tl.load(row_table_ptr + slots // E, mask=wanted, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    starts = blocks * stride_b + head * stride_h + (slots % E) * stride_e
    return tl.load(
        pool_ptr + starts[:, None] + dims[None, :],
        mask=wanted[:, None] & (dims[None, :] < D),
        other=0.0,
    )


@triton.jit
def load_entries(
    source,
    row_table_ptr,
    row,
    head,
    first,
    limit,
    stride_b,
    stride_h,
    stride_e,
    HKV: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,
    OV: tl.constexpr,
    PAGED: tl.constexpr,
):
    """BN entries of a row from ``first`` on, [BN, BLOCK_D]; none from ``limit`` on is read."""
    if PAGED:
        entries = first + tl.arange(0, BN)
        return load_paged_entries(
            source,
            row_table_ptr,
            entries + (OV - 1),
            (entries >= 0) & (entries < limit),
            head,
            stride_b,
            stride_h,
            stride_e,
            D,
            BLOCK_D,
            E,
        )
    else:
        return source.load([row * HKV + head, first, 0]).reshape(BN, BLOCK_D)
