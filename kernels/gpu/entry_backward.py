"""Gradients of compressed entries: tiles of entries against the queries that see them.

The products are transposed, [entries, tokens x heads], so that all four have the tile of entries as
their rows and its sums stay in registers. Entries are few and queries many: queries are split into
ranges, whose fp32 shares a small kernel adds in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..shapes import NSAShape, StepBatch
from .entry_query_backward import entries_operand
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile

Tensor = torch.Tensor

# Ranges of queries per tile of entries, at most: fp32 shares of dK and dV are held for each.
MAX_RANGES = 16
# Queries of a range, at least: shorter ones would spend their time on loading entries.
MIN_RANGE = 512
# Slots of one program of the sum over ranges, and its columns.
_SUM_SLOTS = 16
_SUM_COLUMNS = 128


def entry_gradients(
    q: Tensor,
    k_entries: Tensor,
    v_entries: Tensor,
    d_out: Tensor,
    sums: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """dK [T/d, Hkv, Dk] and dV [T/d, Hkv, Dv] of the entries; ``tile.tokens`` divides a page.

    ``sums`` [2, Hkv, T, tile.rows // tile.tokens] is ``query_gradient``'s.
    """
    num_tokens, num_q_heads, dk = q.shape
    slots, num_kv_heads, dv = v_entries.shape
    padded = tile.rows // tile.tokens
    span = range_len(num_tokens, tile.tokens)
    ranges = triton.cdiv(num_tokens, span)
    shares_k = sums.new_empty(ranges, slots, num_kv_heads, dk)
    shares_v = sums.new_empty(ranges, slots, num_kv_heads, dv)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.keys * nsa.compress_stride)
    block_dk, block_dv = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    _entry_gradient_kernel[(num_tiles * num_kv_heads * ranges,)](
        TensorDescriptor.from_tensor(q, [tile.tokens, padded, block_dk]),
        TensorDescriptor.from_tensor(d_out, [tile.tokens, padded, block_dv]),
        entries_operand(k_entries, tile.keys, block_dk),
        entries_operand(v_entries, tile.keys, block_dv),
        _line(sums[0], tile.rows),
        _line(sums[1], tile.rows),
        shares_k,
        shares_v,
        batch.cu_seqlens_q,
        math.log2(math.e) / math.sqrt(dk),
        num_tokens,
        batch.num_rows,
        num_tiles,
        ranges,
        span,
        slots,
        HKV=num_kv_heads,
        G=num_q_heads // num_kv_heads,
        PADDED_G=padded,
        DK=dk,
        DV=dv,
        BLOCK_DK=block_dk,
        BLOCK_DV=block_dv,
        BT=tile.tokens,
        BN=tile.keys,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sizes = {"span": span, "nsa": nsa}
    return (
        _sum_shares(shares_k, k_entries, batch, factor=1.0 / math.sqrt(dk), **sizes),
        _sum_shares(shares_v, v_entries, batch, factor=1.0, **sizes),
    )


def _line(x: Tensor, size: int) -> TensorDescriptor:
    """A contiguous tensor as one line, in boxes of ``size`` numbers."""
    return TensorDescriptor(x, [x.numel()], [1], [size])


def range_len(num_tokens: int, tile_tokens: int) -> int:
    """Tokens of a range of queries: whole tiles, and at most ``MAX_RANGES`` ranges."""
    return triton.cdiv(max(MIN_RANGE, triton.cdiv(num_tokens, MAX_RANGES)), tile_tokens) * (
        tile_tokens
    )


def _sum_shares(
    shares: Tensor,
    entries: Tensor,
    batch: StepBatch,
    *,
    factor: float,
    span: int,
    nsa: NSAShape,
) -> Tensor:
    """``factor`` · the sum of ``shares`` [ranges, slots, Hkv, D] over ranges that see each slot."""
    total = torch.empty_like(entries)
    columns = total.shape[1] * total.shape[2]
    grid = (triton.cdiv(total.shape[0], _SUM_SLOTS), triton.cdiv(columns, _SUM_COLUMNS))
    _sum_kernel[grid](
        shares,
        total,
        batch.token_rows,
        batch.cu_seqlens_q,
        factor,
        shares.shape[0],
        span,
        total.shape[0],
        columns,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        BS=_SUM_SLOTS,
        BC=_SUM_COLUMNS,
        num_warps=4,
    )
    return total


@triton.jit
def _fold_entry_gradients(s, q, do, v, lse, delta, scale, dk, dv):
    """``dk`` and ``dv`` with the share of one tile of queries; raw scores ``s`` are [BN, BM]."""
    dp = tl.dot(v, do.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_tiles", "ranges", "span", "num_slots"]
)
def _entry_gradient_kernel(
    q_source,
    d_out_source,
    k_source,
    v_source,
    lse_source,
    delta_source,
    shares_k_ptr,
    shares_v_ptr,
    cu_ptr,
    scale,
    num_tokens,
    num_rows,
    num_tiles,
    ranges,
    span,
    num_slots,
    HKV: tl.constexpr,
    G: tl.constexpr,
    PADDED_G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN entries of one KV head against one range of the tokens that see some of them."""
    BM: tl.constexpr = BT * PADDED_G
    # Programs that run together read the same queries; the last ranges are seen by most entries.
    number = ranges - 1 - tl.program_id(0) // (num_tiles * HKV)
    head = tl.program_id(0) // num_tiles % HKV
    _, token0, end = locate_tile(
        cu_ptr, tl.program_id(0) % num_tiles, num_rows, num_tokens, BN * STRIDE
    )
    if token0 >= end:
        return
    slot0 = token0 // STRIDE + (L // STRIDE - 1)
    # Token (s + 1)·d - 1 is the first to see slot s.
    start = tl.maximum(((slot0 + 1) * STRIDE - 1) // BT * BT, number * span)
    stop = tl.minimum(end, (number + 1) * span)
    if start >= stop:
        return
    k = k_source.load([head, slot0, 0]).reshape(BN, BLOCK_DK)
    v = v_source.load([head, slot0, 0]).reshape(BN, BLOCK_DV)
    lanes = tl.arange(0, BM)
    slots = slot0 + tl.arange(0, BN)
    dk = tl.zeros([BN, BLOCK_DK], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV], tl.float32)
    # From here on every token sees all of them, and no mask is needed.
    full = ((slot0 + BN) * STRIDE - 1 + BT - 1) // BT * BT
    full = tl.minimum(tl.maximum(full, start), stop)
    for first in tl.range(start, full, BT, num_stages=STAGES):
        q = q_source.load([first, head * G, 0]).reshape(BM, BLOCK_DK)
        do = d_out_source.load([first, head * G, 0]).reshape(BM, BLOCK_DV)
        lse = lse_source.load([(head * num_tokens + first) * PADDED_G])
        delta = delta_source.load([(head * num_tokens + first) * PADDED_G])
        s = tl.dot(k, q.T, input_precision="ieee")
        seen = (first + lanes // PADDED_G + 1) // STRIDE
        s = tl.where(slots[:, None] < seen[None, :], s, float("-inf"))
        dk, dv = _fold_entry_gradients(s, q, do, v, lse, delta, scale, dk, dv)
    for first in tl.range(full, stop, BT, num_stages=STAGES):
        q = q_source.load([first, head * G, 0]).reshape(BM, BLOCK_DK)
        do = d_out_source.load([first, head * G, 0]).reshape(BM, BLOCK_DV)
        lse = lse_source.load([(head * num_tokens + first) * PADDED_G])
        delta = delta_source.load([(head * num_tokens + first) * PADDED_G])
        s = tl.dot(k, q.T, input_precision="ieee")
        dk, dv = _fold_entry_gradients(s, q, do, v, lse, delta, scale, dk, dv)
    place = (number.to(tl.int64) * num_slots + slots) * HKV + head
    own = (slots < end // STRIDE)[:, None]
    dims_k = tl.arange(0, BLOCK_DK)[None, :]
    tl.store(shares_k_ptr + place[:, None] * DK + dims_k, dk, mask=own & (dims_k < DK))
    dims_v = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(shares_v_ptr + place[:, None] * DV + dims_v, dv, mask=own & (dims_v < DV))


@triton.jit(do_not_specialize=["ranges", "span", "num_slots"])
def _sum_kernel(
    shares_ptr,
    total_ptr,
    token_rows_ptr,
    cu_ptr,
    factor,
    ranges,
    span,
    num_slots,
    columns,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """BS slots x BC columns of [slots, Hkv·D]: shares in order, none where no entry is."""
    slots = tl.program_id(0) * BS + tl.arange(0, BS)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (slots < num_slots)[:, None] & (column < columns)[None, :]
    row = tl.load(token_rows_ptr + slots * STRIDE, mask=slots < num_slots, other=0)
    # Ranges outside of those whose tokens see the slot were not written.
    first = ((slots + 1) * STRIDE - 1) // span
    last = (tl.load(cu_ptr + row + 1) - 1) // span
    is_entry = slots >= tl.load(cu_ptr + row) // STRIDE + (L // STRIDE - 1)
    total = tl.zeros([BS, BC], tl.float32)
    place = slots.to(tl.int64)[:, None] * columns + column[None, :]
    share = place
    for number in range(ranges):
        seen = is_entry & (number >= first) & (number <= last)
        total += tl.load(shares_ptr + share, mask=inside & seen[:, None], other=0.0)
        share += num_slots * columns
    tl.store(total_ptr + place, (total * factor).to(total_ptr.dtype.element_ty), mask=inside)
