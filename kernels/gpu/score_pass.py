"""Selection of a prefill step: block scores from entries and final LSE, in bounded scratch.

The second pass over compressed keys computes the products transposed, [entries, tokens x heads],
with columns ordered so that one thread of the matrix unit's accumulator layout holds all heads of
a token: the sum over a group's heads then needs no exchange between threads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..shapes import NSAShape, StepBatch
from .entry_gather import Entries, load_entries
from .query_tiles import locate_tile, num_query_tiles, num_visible
from .select_blocks import select_tiles
from .tuning import Tile, score_tile

Tensor = torch.Tensor

# Bytes of block scores held at a time, whatever T and C are.
SCRATCH_BYTES = 256 << 20


def select_from_entries(
    q: Tensor,
    entries: Entries,
    lse: Tensor | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Selected blocks [T, Hkv, n] int32 of every token; ``lse`` None: all contexts are dense.

    ``q`` [T, Hq, Dk]; ``lse`` [T, Hq] fp32, base 2, from ``attend_entries``.
    """
    num_q_heads = q.shape[1]
    num_kv_heads = entries.k.shape[1] if entries.paged else entries.k.shape[0] // batch.num_rows
    tile = tile or score_tile(num_q_heads // num_kv_heads, q.shape[2])
    selection = torch.empty(
        q.shape[0], num_kv_heads, nsa.num_selected, dtype=torch.int32, device=q.device
    )
    if lse is None:
        select_tiles(None, selection, batch, nsa=nsa, tile_tokens=tile.tokens)
        return selection
    num_tiles = num_query_tiles(q.shape[0], batch.num_rows, tile.tokens)
    widest = triton.cdiv(batch.max_context_len, nsa.page)
    planes = 2 if nsa.overlap > 1 else 1
    tile_bytes = planes * 4 * tile.tokens * num_kv_heads * widest
    step = max(1, min(num_tiles, scratch_bytes // tile_bytes))
    scratch = torch.empty(
        planes * step * tile.tokens * num_kv_heads * widest, dtype=torch.float32, device=q.device
    )
    for first in range(0, num_tiles, step):
        count = min(step, num_tiles - first)
        width = _blocks_before(min((first + count) * tile.tokens, q.shape[0]), batch, nsa)
        size = planes * count * tile.tokens * num_kv_heads * width
        scores = scratch[:size].view(planes, count * tile.tokens, num_kv_heads, width)
        if width > nsa.num_selected:
            score_tiles(q, entries, lse, scores, batch, nsa=nsa, tile=tile, first_tile=first)
        span = {"tile_tokens": tile.tokens, "first_tile": first, "count": count}
        select_tiles(scores, selection, batch, nsa=nsa, **span)
    return selection


def _blocks_before(stop: int, batch: StepBatch, nsa: NSAShape) -> int:
    """Bound on the blocks that tokens before ``stop`` have; tighter when the step is one row."""
    spared = batch.num_tokens - stop if batch.num_rows == 1 else 0
    return max(1, triton.cdiv(batch.max_context_len - spared, nsa.page))


def score_tiles(
    q: Tensor,
    entries: Entries,
    lse: Tensor,
    scores: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile,
    first_tile: int,
) -> None:
    """Write ``scores`` [planes, tiles·BT, Hkv, blocks] of the query tiles from ``first_tile`` on.

    Plane 0 sums a block's own page of entries; plane 1 what its page gives to the block before it.
    """
    num_kv_heads, blocks = scores.shape[2:]
    block_dk = triton.next_power_of_2(q.shape[2])
    count = scores.shape[1] // tile.tokens
    _score_kernel[(count * num_kv_heads,)](
        q,
        entries.operand(entries.k, tile.keys, block_dk),
        batch.block_table,
        lse,
        batch.positions,
        batch.cu_seqlens_q,
        scores[0],
        scores[-1],
        math.log2(math.e) / math.sqrt(q.shape[2]),
        q.shape[0],
        batch.num_rows,
        first_tile,
        count,
        blocks,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        *entries.k.stride()[:3],
        HKV=num_kv_heads,
        G=q.shape[1] // num_kv_heads,
        PADDED_G=triton.next_power_of_2(q.shape[1] // num_kv_heads),
        DK=q.shape[2],
        BLOCK_DK=block_dk,
        BT=tile.tokens,
        BN=tile.keys,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        E=nsa.entries_per_page,
        DENSE=nsa.dense_len,
        PAGED=entries.paged,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _columns(BT: tl.constexpr, PADDED_G: tl.constexpr):
    """Token in the tile and head in the group of each column of the transposed product.

    Column c = 8j + 2q + b lies in threads q of four: tokens follow q, heads follow b and low j.
    """
    columns = tl.arange(0, BT * PADDED_G)
    if (BT >= 4) and (PADDED_G >= 2):
        return (
            columns // (4 * PADDED_G) * 4 + columns // 2 % 4,
            columns // 8 % (PADDED_G // 2) * 2 + columns % 2,
        )
    else:
        return columns // PADDED_G, columns % PADDED_G


@triton.jit
def _sum_heads(p, BN: tl.constexpr, BT: tl.constexpr, PADDED_G: tl.constexpr):
    """[BN, BT·PADDED_G] in the order of ``_columns`` -> [BN, BT]."""
    if (BT >= 4) and (PADDED_G >= 2):
        p = tl.reshape(p, [BN, BT // 4, PADDED_G // 2, 4, 2])
        return tl.reshape(tl.sum(tl.sum(p, 4), 2), [BN, BT])
    else:
        return tl.sum(tl.reshape(p, [BN, BT, PADDED_G]), 2)


@triton.jit
def _store_scores(s, scale, lse, start, seen, own_ptr, spill_ptr, source, valid, blocks,
                  BN: tl.constexpr, BT: tl.constexpr, PADDED_G: tl.constexpr, E: tl.constexpr,
                  OV: tl.constexpr):  # fmt: skip
    """Write the page sums of slots ``start`` … of BT tokens from ``s`` [BN, BT·PADDED_G]."""
    slots = tl.arange(0, BN)
    p = _sum_heads(tl.exp2(s * scale - lse[None, :]), BN, BT, PADDED_G)  # [BN, BT]
    at = start + slots[:, None]
    p = tl.where((at >= OV - 1) & (at < seen[None, :]), p, 0.0)
    # Slots 0 … OV - 2 of a page lie partly in the page before: weights here, the rest there.
    inside = tl.minimum(slots % E + 1, OV).to(tl.float32)
    pages = start // E + tl.arange(0, BN // E)
    target = source[None, :] + pages[:, None]
    stored = (pages[:, None] < blocks) & valid[None, :]
    own = tl.sum(tl.reshape(p * inside[:, None], [BN // E, E, BT]), 1)  # [BN / E, BT]
    tl.store(own_ptr + target, own, mask=stored)
    if OV > 1:
        spill = tl.sum(tl.reshape(p * (OV - inside)[:, None], [BN // E, E, BT]), 1)
        tl.store(spill_ptr + target, spill, mask=stored)


@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "first_tile", "count", "blocks", "table_stride"]
)
def _score_kernel(
    q_ptr,
    k_source,
    table_ptr,
    lse_ptr,
    positions_ptr,
    cu_ptr,
    own_ptr,
    spill_ptr,
    scale,
    num_tokens,
    num_rows,
    first_tile,
    count,
    blocks,
    q_stride_t,
    q_stride_h,
    table_stride,
    k_stride_b,
    k_stride_h,
    k_stride_e,
    HKV: tl.constexpr,
    G: tl.constexpr,
    PADDED_G: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    DENSE: tl.constexpr,
    PAGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Block scores of BT tokens, summed over the G heads of one KV head."""
    OV: tl.constexpr = L // STRIDE
    local = count - 1 - tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    row, token0, end = locate_tile(cu_ptr, first_tile + local, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    lanes = tl.arange(0, BT)
    tile_valid = token0 + lanes < end
    tile_positions = tl.load(positions_ptr + token0 + lanes, mask=tile_valid, other=-1).to(tl.int32)
    # Such tokens select every block they have: no score is asked for.
    last = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32)
    if last < DENSE:
        return
    visible = num_visible(tile_positions, L, STRIDE)  # [BT]
    most = num_visible(last, L, STRIDE)
    members, group_heads = _columns(BT, PADDED_G)
    tokens = token0 + members
    heads = head * G + group_heads
    valid = (tokens < end) & (group_heads < G)
    dims = tl.arange(0, BLOCK_DK)
    q = tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims,
        mask=valid[:, None] & (dims[None, :] < DK),
        other=0.0,
    ).T  # [BLOCK_DK, BT·PADDED_G]; transposed here, so that it is staged once and not every turn
    # +inf makes the exponential of a padding head 0.
    lse = tl.load(lse_ptr + tokens.to(tl.int64) * (HKV * G) + heads, mask=valid, other=float("inf"))
    row_table = table_ptr + row.to(tl.int64) * table_stride
    members_out = (local.to(tl.int64) * BT + lanes) * HKV + head  # [BT]
    source = members_out * blocks
    seen = tl.where(tile_valid, visible + (OV - 1), 0)  # [BT]
    stop = most + OV - 1
    k = load_entries(k_source, row_table, row, head, 1 - OV, most, k_stride_b, k_stride_h,
                     k_stride_e, HKV, BN, DK, BLOCK_DK, E, OV, PAGED)  # fmt: skip
    s = tl.dot(k, q, input_precision="ieee")  # [BN, BT·PADDED_G]
    # A turn ends with the next product: the keys after those are fetched during the exponentials.
    for start in tl.range(0, stop - BN, BN, num_stages=STAGES):
        _store_scores(s, scale, lse, start, seen, own_ptr, spill_ptr, source, tile_valid, blocks,
                      BN, BT, PADDED_G, E, OV)  # fmt: skip
        k = load_entries(k_source, row_table, row, head, start + BN - (OV - 1), most, k_stride_b,
                         k_stride_h, k_stride_e, HKV, BN, DK, BLOCK_DK, E, OV, PAGED)  # fmt: skip
        s = tl.dot(k, q, input_precision="ieee")
    _store_scores(s, scale, lse, (stop - 1) // BN * BN, seen, own_ptr, spill_ptr, source,
                  tile_valid, blocks, BN, BT, PADDED_G, E, OV)  # fmt: skip
