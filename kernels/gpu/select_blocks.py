"""Block scores of compressed probabilities and the exact top-n selection (equations 9 to 12)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import NSAShape, StepBatch
from .query_tiles import locate_tile, num_query_tiles, num_visible

Tensor = torch.Tensor

# Keys of blocks in the search for the threshold: forced ones above any score, absent ones below.
_FORCED = tl.constexpr(2**31 - 1)
_ABSENT = tl.constexpr(-(2**31))


def block_scores(p: Tensor, *, nsa: NSAShape, num_kv_heads: int) -> Tensor:
    """Importance [T, Hkv, NB] fp32 of each block from ``p`` [T, Hq, C] fp32.

    NB covers every token that sees at most C entries. ``p`` is the softmax over entries; each
    spreads over the blocks of its strides, and a group's G heads are summed (equations 9, 10).
    """
    check(p.ndim == 3 and p.dtype == torch.float32, "p must be [T, Hq, C] fp32", p=p)
    check(p.shape[1] % num_kv_heads == 0, "Hq is no multiple of Hkv", p=p, Hkv=num_kv_heads)
    num_tokens, num_q_heads, num_entries = p.shape
    last_token = num_entries * nsa.compress_stride + nsa.compress_len - 2
    blocks = max(1, last_token // nsa.page + 1)
    scores = p.new_empty(num_tokens, num_kv_heads, blocks)
    if scores.numel() == 0:
        return scores
    block = min(triton.next_power_of_2(blocks), 256)
    _spread_kernel[(num_tokens * num_kv_heads, triton.cdiv(blocks, block))](
        p.contiguous(),
        scores,
        num_entries,
        blocks,
        G=num_q_heads // num_kv_heads,
        OV=nsa.overlap,
        E=nsa.entries_per_page,
        BLOCK=block,
        num_warps=2,
    )
    return scores


def select_blocks(scores: Tensor, positions: Tensor, *, nsa: NSAShape) -> Tensor:
    """Blocks [T, Hkv, n] int32, ascending, -1 padded, that each token selects by ``scores``.

    ``scores`` [T, Hkv, NB] fp32 and finite, ``positions`` [T]. Forced blocks first, then higher
    scores, then smaller indices; with at most n blocks all of them (NB may then be smaller).
    """
    check(scores.ndim == 3 and scores.dtype == torch.float32, "scores must be fp32", scores=scores)
    check(positions.shape == scores.shape[:1], "one position per token", positions=positions)
    scores = scores.contiguous()
    num_tokens, num_kv_heads, blocks = scores.shape
    selection = torch.empty(
        num_tokens, num_kv_heads, nsa.num_selected, dtype=torch.int32, device=scores.device
    )
    if selection.numel() == 0:
        return selection
    _select_rows_kernel[(num_tokens * num_kv_heads,)](
        scores,
        selection,
        positions,
        blocks,
        HKV=num_kv_heads,
        **_selection_sizes(blocks, nsa),
    )
    return selection


def select_tiles(
    scores: Tensor | None,
    selection: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile_tokens: int,
    first_tile: int = 0,
    count: int | None = None,
) -> None:
    """Fill ``selection`` for ``count`` query tiles from their scores [planes, tiles·BT, Hkv, NB].

    ``scores`` None, or no wider than n blocks: every token takes all blocks it has.
    """
    if count is None:
        count = num_query_tiles(batch.num_tokens, batch.num_rows, tile_tokens)
    num_kv_heads = selection.shape[1]
    blocks = nsa.num_selected if scores is None else scores.shape[3]
    own = selection if scores is None else scores[0]
    spill = selection if scores is None else scores[-1]
    _select_tiles_kernel[(count * tile_tokens * num_kv_heads,)](
        own,
        spill,
        selection,
        batch.positions,
        batch.cu_seqlens_q,
        batch.num_tokens,
        batch.num_rows,
        first_tile,
        blocks,
        HKV=num_kv_heads,
        BT=tile_tokens,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        SCORED=scores is not None and blocks > nsa.num_selected,
        **_selection_sizes(blocks, nsa),
    )


def _selection_sizes(blocks: int, nsa: NSAShape) -> dict[str, int]:
    block = max(triton.next_power_of_2(blocks), triton.next_power_of_2(nsa.num_selected), 16)
    return {
        "P": nsa.page,
        "N": nsa.num_selected,
        "INITIAL": nsa.num_initial,
        "LOCAL": nsa.num_local,
        "BLOCK_N": triton.next_power_of_2(nsa.num_selected),
        "BLOCK": block,
        "num_warps": max(1, min(block // 1024, 16)),
    }


@triton.jit
def _ordered(scores):
    """int32 keys in the order of fp32 ``scores``; -0.0 equals 0.0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def choose_blocks(scores, position, P: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr,
                  LOCAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Mask [BLOCK] of the N blocks that a token with more than N candidates selects.

    Bisects for the largest key that at least N blocks reach, and stops as soon as exactly N do.
    Blocks equal at that key are taken from the smallest index on.
    """
    blocks = tl.arange(0, BLOCK)
    current = position // P
    forced = (blocks < INITIAL) | (blocks > current - LOCAL)
    keys = tl.where(forced, _FORCED, _ordered(scores))
    keys = tl.where(blocks <= current, keys, _ABSENT)
    low = tl.min(tl.where(blocks <= current, keys, _FORCED), 0).to(tl.int64)
    high = tl.max(tl.where(forced, _ABSENT, keys), 0).to(tl.int64)
    high = tl.where(tl.sum((keys == _FORCED).to(tl.int32), 0) >= N, _FORCED, high)
    reached = current + 1
    while (low < high) & (reached != N):
        middle = low + (high - low + 1) // 2
        above = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        enough = above >= N
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    threshold = low.to(tl.int32)
    chosen = keys >= threshold
    if reached != N:
        certain = keys > threshold
        equal = (keys == threshold).to(tl.int32)
        spare = N - tl.sum(certain.to(tl.int32), 0)
        chosen = certain | ((equal != 0) & (tl.cumsum(equal, 0) <= spare))
    return chosen


@triton.jit
def _store_selection(selection_ptr, chosen, N: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Write the chosen blocks ascending at ``selection_ptr`` [N], -1 after them."""
    blocks = tl.arange(0, BLOCK)
    ranks = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(selection_ptr + ranks, blocks, mask=chosen)
    places = tl.arange(0, BLOCK_N)
    number = tl.sum(chosen.to(tl.int32), 0)
    tl.store(selection_ptr + places, -1, mask=(places >= number) & (places < N))


@triton.jit
def _select_rows_kernel(
    scores_ptr,
    selection_ptr,
    positions_ptr,
    blocks,
    HKV: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and KV head."""
    line = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + line // HKV).to(tl.int32)
    offsets = tl.arange(0, BLOCK)
    chosen = offsets * P <= position
    if position >= N * P:
        read = chosen & (offsets < blocks)
        scores = tl.load(scores_ptr + line * blocks + offsets, mask=read, other=0.0)
        chosen = choose_blocks(scores, position, P, N, INITIAL, LOCAL, BLOCK)
    _store_selection(selection_ptr + line * N, chosen, N, BLOCK_N, BLOCK)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "first_tile", "blocks"])
def _select_tiles_kernel(
    own_ptr,
    spill_ptr,
    selection_ptr,
    positions_ptr,
    cu_ptr,
    num_tokens,
    num_rows,
    first_tile,
    blocks,
    HKV: tl.constexpr,
    BT: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    SCORED: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and KV head of a query tile; scores are laid out by tile."""
    OV: tl.constexpr = L // STRIDE
    line = tl.program_id(0)
    local = line // HKV
    _, token0, end = locate_tile(cu_ptr, first_tile + local // BT, num_rows, num_tokens, BT)
    token = token0 + local % BT
    if token >= end:
        return
    position = tl.load(positions_ptr + token).to(tl.int32)
    offsets = tl.arange(0, BLOCK)
    chosen = offsets * P <= position
    # Nested, because the outer condition is known at compile time.
    if SCORED:  # noqa: SIM102
        if position >= N * P:
            # Slots of pages from here on hold no entry that this token sees: not written.
            slots = num_visible(position, L, STRIDE) + (OV - 1)
            E: tl.constexpr = P // STRIDE
            base = line.to(tl.int64) * blocks + offsets
            scores = tl.load(own_ptr + base, mask=offsets * E < slots, other=0.0)
            if OV > 1:
                scores += tl.load(spill_ptr + base + 1, mask=(offsets + 1) * E < slots, other=0.0)
            chosen = choose_blocks(scores, position, P, N, INITIAL, LOCAL, BLOCK)
    place = token.to(tl.int64) * HKV + line % HKV
    _store_selection(selection_ptr + place * N, chosen, N, BLOCK_N, BLOCK)


@triton.jit
def _spread_kernel(
    p_ptr,
    scores_ptr,
    entries,
    blocks,
    G: tl.constexpr,
    OV: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of BLOCK blocks of one token and KV head."""
    line = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.zeros([BLOCK], tl.float32)
    for near in tl.static_range(1 - OV, E):
        # An entry starts ``near`` strides into the block; it counts the strides it has inside.
        weight = min(near + OV, E) - max(near, 0)
        entry = block * E + near
        read = (entry >= 0) & (entry < entries)
        for member in range(G):
            head_p = p_ptr + (line * G + member) * entries
            score += weight * tl.load(head_p + entry, mask=read, other=0.0)
    tl.store(scores_ptr + line * blocks + block, score, mask=block < blocks)
