"""Block scores of compressed probabilities and the exact top-n selection (equations 9 to 12)."""

from __future__ import annotations

import math

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
    sizes = _selection_sizes(blocks, nsa)
    _select_rows_kernel[(triton.cdiv(num_tokens * num_kv_heads, sizes["ROWS"]),)](
        scores,
        selection,
        positions,
        num_tokens * num_kv_heads,
        blocks,
        HKV=num_kv_heads,
        **sizes,
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
    sizes = _selection_sizes(blocks, nsa, multiple=tile_tokens * num_kv_heads)
    _select_tiles_kernel[(count * tile_tokens * num_kv_heads // sizes["ROWS"],)](
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
        **sizes,
    )


def _selection_sizes(blocks: int, nsa: NSAShape, multiple: int = 0) -> dict[str, int]:
    """Sizes of a program that takes as many rows as fit its registers and divide ``multiple``."""
    block = max(triton.next_power_of_2(blocks), triton.next_power_of_2(nsa.num_selected), 16)
    return {
        "P": nsa.page,
        "N": nsa.num_selected,
        "INITIAL": nsa.num_initial,
        "LOCAL": nsa.num_local,
        "BLOCK_N": triton.next_power_of_2(nsa.num_selected),
        "BLOCK": block,
        "ROWS": math.gcd(max(1, min(1024 // block, 8)), multiple or 8),
        "num_warps": max(1, min(block // 1024, 16)),
    }


@triton.jit
def _ordered(scores):
    """int32 keys in the order of fp32 ``scores``; -0.0 equals 0.0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def choose_blocks(scores, positions, P: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr,
                  LOCAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Mask [R, BLOCK] of the N blocks that each token with more than N candidates selects.

    ``scores`` [R, BLOCK], ``positions`` [R]. Bisects for the largest key that at least N blocks
    reach, until exactly N do in every row. Blocks equal at that key are taken from the smallest
    index on. Tokens with at most N candidates get all of them.
    """
    blocks = tl.arange(0, BLOCK)[None, :]
    current = tl.where(positions < 0, -1, positions // P)
    candidate = blocks <= current[:, None]
    forced = candidate & ((blocks < INITIAL) | (blocks > current[:, None] - LOCAL))
    keys = tl.where(forced, _FORCED, _ordered(scores))
    keys = tl.where(candidate, keys, _ABSENT)
    low = tl.min(tl.where(candidate, keys, _FORCED), 1).to(tl.int64)
    high = tl.max(tl.where(forced, _ABSENT, keys), 1).to(tl.int64)
    high = tl.where(tl.sum(forced.to(tl.int32), 1) >= N, _FORCED, high)
    reached = tl.where(current < N, N, current + 1)
    active = (low < high) & (reached != N)
    while tl.max(active.to(tl.int32), 0) != 0:
        middle = low + (high - low + 1) // 2
        above = tl.sum((keys >= middle.to(tl.int32)[:, None]).to(tl.int32), 1)
        enough = above >= N
        low = tl.where(active & enough, middle, low)
        reached = tl.where(active & enough, above, reached)
        high = tl.where(active & (above < N), middle - 1, high)
        active = (low < high) & (reached != N)
    threshold = tl.where(current < N, _ABSENT + 1, low.to(tl.int32))[:, None]
    chosen = keys >= threshold
    if tl.max((reached != N).to(tl.int32), 0) != 0:
        certain = keys > threshold
        equal = (keys == threshold).to(tl.int32)
        spare = N - tl.sum(certain.to(tl.int32), 1)
        first = (equal != 0) & (tl.cumsum(equal, 1) <= spare[:, None])
        chosen = tl.where((reached != N)[:, None], certain | first, chosen)
    return chosen


@triton.jit
def _store_selection(selection_ptr, lines, valid, chosen, N: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Write the chosen blocks [R, BLOCK] ascending at ``lines`` [R] of N, -1 after them."""
    chosen = chosen & valid[:, None]
    blocks = tl.zeros([chosen.shape[0], BLOCK], tl.int32) + tl.arange(0, BLOCK)[None, :]
    ranks = tl.cumsum(chosen.to(tl.int32), 1) - 1
    starts = selection_ptr + lines[:, None] * N
    tl.store(starts + ranks, blocks, mask=chosen)
    places = tl.arange(0, BLOCK_N)[None, :]
    number = tl.sum(chosen.to(tl.int32), 1)[:, None]
    absent = tl.full([chosen.shape[0], BLOCK_N], -1, tl.int32)
    tl.store(starts + places, absent, mask=valid[:, None] & (places >= number) & (places < N))


@triton.jit
def _select_rows_kernel(
    scores_ptr,
    selection_ptr,
    positions_ptr,
    num_lines,
    blocks,
    HKV: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS pairs of token and KV head."""
    lines = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = lines < num_lines
    positions = tl.load(positions_ptr + lines // HKV, mask=valid, other=-1).to(tl.int32)
    offsets = tl.arange(0, BLOCK)[None, :]
    read = (offsets * P <= positions[:, None]) & (offsets < blocks)
    scores = tl.load(scores_ptr + lines[:, None] * blocks + offsets, mask=read, other=0.0)
    chosen = choose_blocks(scores, positions, P, N, INITIAL, LOCAL, BLOCK)
    _store_selection(selection_ptr, lines, valid, chosen, N, BLOCK_N, BLOCK)


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
    ROWS: tl.constexpr,
):
    """ROWS pairs of token and KV head of one query tile; scores are laid out by tile."""
    OV: tl.constexpr = L // STRIDE
    E: tl.constexpr = P // STRIDE
    line0 = tl.program_id(0) * ROWS
    tile = first_tile + line0 // (HKV * BT)
    _, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 + line0 // HKV % BT >= end:
        return
    lines = line0 + tl.arange(0, ROWS)
    tokens = token0 + lines // HKV % BT
    valid = tokens < end
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    offsets = tl.arange(0, BLOCK)[None, :]
    chosen = offsets * P <= positions[:, None]
    # Nested, because the outer condition is known at compile time.
    if SCORED:  # noqa: SIM102
        if tl.max(positions, 0) >= N * P:
            # Slots of pages from here on hold no entry that this token sees: not written. Nor is
            # anything where every token of the score pass's tile takes all its blocks.
            slots = num_visible(positions, L, STRIDE) + (OV - 1)
            slots = tl.where(positions >= N * P, slots, 0)[:, None]
            base = lines.to(tl.int64)[:, None] * blocks + offsets
            scores = tl.load(own_ptr + base, mask=offsets * E < slots, other=0.0)
            if OV > 1:
                scores += tl.load(spill_ptr + base + 1, mask=(offsets + 1) * E < slots, other=0.0)
            chosen = choose_blocks(scores, positions, P, N, INITIAL, LOCAL, BLOCK)
    places = tokens.to(tl.int64) * HKV + lines % HKV
    _store_selection(selection_ptr, places, valid, chosen, N, BLOCK_N, BLOCK)


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
