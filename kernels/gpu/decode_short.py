"""Decode's compressed attention and selection in one launch, where contexts fit one tile.

A program attends all entries of one token and KV head, and ranks the blocks by the sums of the
softmax it holds: no partial result is written, and no launch waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .context_splits import overlap_launches
from .decode_selection import list_blocks
from .decode_splits import num_entry_slots


@triton.jit
def _scores_of_blocks(
    by_entry,  # [ENTRIES] fp32, the group's attention to each entry
    slots,
    OVERLAP: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """[PAGES]: an entry's l/d strides count for its own block or for the one before (eq. 9, 10)."""
    before = tl.maximum(OVERLAP - 1 - slots % PER_PAGE, 0)
    blocks = tl.arange(0, PAGES)[:, None]
    page = (slots // PER_PAGE)[None, :]
    strides = tl.where(page == blocks, (OVERLAP - before)[None, :], 0)
    strides += tl.where(page == blocks + 1, before[None, :], 0)
    return tl.sum(by_entry[None, :] * strides.to(tl.float32), 1)


@triton.jit
def _list_highest(
    to,
    score,  # [PAGES] fp32
    current,
    SELECTED: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Answer forced blocks and those of the highest scores, ascending; the first of a tie.

    There are more blocks than are SELECTED.
    """
    blocks = tl.arange(0, PAGES)
    forced = (blocks < INITIAL) | (blocks > current - LOCAL)
    # What is no number ranks as 0: n blocks are taken whatever the scores, so the list ends there.
    key = tl.where(forced, float("inf"), tl.where(score > 0, score, 0.0))
    key = tl.where(blocks <= current, key, -1.0)
    first = blocks[None, :] < blocks[:, None]
    ahead = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & first)
    taken = (tl.sum(ahead.to(tl.int32), 1) < SELECTED) & (blocks <= current)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(to + place, blocks, mask=taken)


@triton.jit
def attend_and_select(
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [N, Hkv, P/d, Dk]
    v_ptr,  # [N, Hkv, P/d, Dv]
    positions_ptr,  # [T]
    token_rows_ptr,  # [T]
    block_table_ptr,  # [B, M]
    out_ptr,  # [T, Hq, Dv]
    selection_ptr,  # [T, Hkv, n]
    scale,
    stride_qt,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_ke,
    stride_vn,
    stride_vh,
    stride_ve,
    stride_table,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,  # the group, padded
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        overlap_launches()
    GROUP: tl.constexpr = HQ // HKV
    PER_PAGE: tl.constexpr = PAGE // STRIDE
    OVERLAP: tl.constexpr = LEN // STRIDE
    # Heads vary fastest: neighbouring programs read neighbouring runs of the same blocks.
    head = tl.program_id(0)
    token = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int32)
    row = tl.load(token_rows_ptr + token).to(tl.int64)
    slots = tl.arange(0, ENTRIES)
    held = (slots >= OVERLAP - 1) & (slots < num_entry_slots(position + 1, LEN, STRIDE))
    table = block_table_ptr + row * stride_table
    block = tl.load(table + slots // PER_PAGE, mask=held, other=0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    live = rows < GROUP
    heads = head * GROUP + rows
    dk = tl.arange(0, DK_PAD)
    q_at = token.to(tl.int64) * stride_qt + heads * stride_qh
    q = tl.load(
        q_ptr + q_at[:, None] + dk[None, :], mask=live[:, None] & (dk < DK)[None, :], other=0.0
    )
    at = block * stride_kn + head * stride_kh + slots % PER_PAGE * stride_ke
    k = tl.load(
        k_ptr + at[:, None] + dk[None, :], mask=held[:, None] & (dk < DK)[None, :], other=0.0
    )
    if WITH_OUTPUT:
        # Values are on their way while the keys are multiplied.
        dv = tl.arange(0, DV_PAD)
        at = block * stride_vn + head * stride_vh + slots % PER_PAGE * stride_ve
        v = tl.load(
            v_ptr + at[:, None] + dv[None, :], mask=held[:, None] & (dv < DV)[None, :], other=0.0
        )
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    scores = tl.where(held[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])  # [ROWS, ENTRIES]
    total = tl.sum(p, 1)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    if WITH_OUTPUT:
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * share[:, None]
        out_at = (token.to(tl.int64) * HQ + heads)[:, None] * DV + dv[None, :]
        keep = live[:, None] & (dv < DV)[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=keep)
    current = tl.where(position < 0, -1, position // PAGE)
    to = selection_ptr + (token.to(tl.int64) * HKV + head) * SELECTED
    if current < SELECTED:
        list_blocks(to, to, current + 1, 0, SELECTED, SELECTED_PAD, False)
    else:
        by_entry = tl.sum(tl.where(live[:, None], p * share[:, None], 0.0), 0)
        score = _scores_of_blocks(by_entry, slots, OVERLAP, PER_PAGE, ENTRIES // PER_PAGE)
        _list_highest(to, score, current, SELECTED, INITIAL, LOCAL, ENTRIES // PER_PAGE)
