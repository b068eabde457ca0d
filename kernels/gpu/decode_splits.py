"""First half of decode's compressed attention: every split of a context's entries, attended.

A program takes neighbouring splits of one KV head in turn, through as many rows. Of each split it
leaves the (maximum, sum, accumulator) of its softmax, and of each page what the page's entries give
to their own block and to the one before it, relative to a maximum that holds for a tile of pages.
What bounds the loop is how fast instructions issue, not arithmetic: so there are no masks on loads,
no logarithms, and one sum over pages serves both the softmax and the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .context_splits import load_rows, overlap_launches, size_of_split


@triton.jit
def num_entry_slots(context, LEN: tl.constexpr, STRIDE: tl.constexpr):
    """Entry slots of a row, up to and including its last visible entry; 0 where none is."""
    visible = tl.where(context < LEN, 0, (context - LEN) // STRIDE + 1)
    return tl.where(visible > 0, visible + LEN // STRIDE - 1, 0)


@triton.jit
def _splits_of_rows(
    cu_seqlens_ptr,
    context_lens_ptr,
    num_rows,
    first_token,
    last_token,
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Splits of each row [BATCH]; 0 for rows without a token among those asked for."""
    every = tl.arange(0, BATCH)
    begins = tl.load(cu_seqlens_ptr + every, mask=every < num_rows, other=0)
    ends = tl.load(cu_seqlens_ptr + every + 1, mask=every < num_rows, other=0)
    contexts = tl.load(context_lens_ptr + every, mask=every < num_rows, other=0)
    slots = num_entry_slots(contexts, LEN, STRIDE)
    splits = tl.cdiv(slots, size_of_split(slots, MIN_SPLIT, SPREAD))
    here = (begins < ends) & (ends > first_token) & (begins < last_token)
    return tl.where(here, splits, 0)


@triton.jit(do_not_specialize=["num_rows", "first_token", "last_token"])
def attend_splits(
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [N, Hkv, P/d, Dk]
    v_ptr,  # [N, Hkv, P/d, Dv]
    positions_ptr,  # [T]
    cu_seqlens_ptr,  # [B+1]
    context_lens_ptr,  # [B]
    block_table_ptr,  # [B, M]
    max_ptr,  # [tokens, Hq, splits]
    sum_ptr,  # [tokens, Hq, splits]
    acc_ptr,  # [tokens, Hq, splits, Dv]
    own_ptr,  # [tokens, Hq, pages]
    prev_ptr,  # [tokens, Hq, pages]
    tile_top_ptr,  # [tokens, Hq, tiles]
    num_rows,
    first_token,
    last_token,
    num_pages,
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
    TOKENS: tl.constexpr,  # of a row, in one program
    ROWS: tl.constexpr,  # TOKENS x G, padded
    SINGLE: tl.constexpr,  # every row has one token
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    ENTRIES: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH: tl.constexpr,  # rows, padded
    WITH_OUTPUT: tl.constexpr,
    ALIKE: tl.constexpr,  # keys and values have the same strides
    PDL: tl.constexpr,
):
    if PDL:
        overlap_launches()
    GROUP: tl.constexpr = HQ // HKV
    PER_PAGE: tl.constexpr = PAGE // STRIDE
    OVERLAP: tl.constexpr = LEN // STRIDE
    PAGES: tl.constexpr = ENTRIES // PER_PAGE
    # Heads vary fastest: neighbouring programs read neighbouring runs of the same blocks.
    head = tl.program_id(0) % HKV
    token_tile = tl.program_id(0) // HKV
    # The splits that exist are numbered through all rows and divided evenly among the programs: a
    # bound far above them costs nothing, and no program is left to finish alone.
    splits = _splits_of_rows(
        cu_seqlens_ptr, context_lens_ptr, num_rows, first_token, last_token,
        LEN, STRIDE, MIN_SPLIT, SPREAD, BATCH,
    )  # fmt: skip
    numbered = tl.cumsum(splits, 0)  # splits of the rows up to each
    every = tl.arange(0, BATCH)
    all_splits = tl.sum(splits, 0)
    first_split = tl.program_id(1) * all_splits // tl.num_programs(1)
    last_split = (tl.program_id(1) + 1) * all_splits // tl.num_programs(1)
    first_row = tl.sum((numbered <= first_split).to(tl.int32), 0)
    last_row = tl.sum((numbered < last_split).to(tl.int32), 0)
    last_row = tl.where(first_split < last_split, last_row, first_row - 1)
    rows = tl.arange(0, ROWS)
    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    slot_in_page = tl.arange(0, PER_PAGE)
    prev_weight = tl.maximum(OVERLAP - 1 - slot_in_page, 0).to(tl.float32)
    for step in range(last_row - first_row + 1):
        row = first_row + step
        before = tl.sum(tl.where(every < row, splits, 0), 0)
        row_first = tl.load(cu_seqlens_ptr + row)
        row_last = tl.load(cu_seqlens_ptr + row + 1)
        num_slots = num_entry_slots(tl.load(context_lens_ptr + row), LEN, STRIDE)
        size = size_of_split(num_slots, MIN_SPLIT, SPREAD)
        begin = tl.maximum(first_split - before, 0) * size
        end = tl.minimum((last_split - before) * size, num_slots)
        tokens = row_first + token_tile * TOKENS + rows // GROUP
        live = (rows < TOKENS * GROUP) & (tokens < row_last)
        live &= (tokens >= first_token) & (tokens < last_token)
        if (begin < end) & (tl.sum(live.to(tl.int32), 0) > 0):
            heads = head * GROUP + rows % GROUP
            position = tl.load(positions_ptr + tokens, mask=live, other=-1).to(tl.int32)
            last_slot = num_entry_slots(position + 1, LEN, STRIDE)  # [ROWS]
            scored = live & (position // PAGE + 1 > SELECTED)
            any_scored = tl.sum(scored.to(tl.int32), 0) > 0
            q_at = tokens.to(tl.int64) * stride_qt + heads * stride_qh
            q = tl.load(
                q_ptr + q_at[:, None] + dk[None, :],
                mask=live[:, None] & (dk < DK)[None, :],
                other=0.0,
            )  # [ROWS, DK]
            out_at = (tokens - first_token).to(tl.int64) * HQ + heads  # [ROWS]
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS, PAGES], tl.float32)  # page by page, summed at a split's end
            acc = tl.zeros([ROWS, DV_PAD], tl.float32)
            k_head = k_ptr + head * stride_kh
            v_head = v_ptr + head * stride_vh
            table = block_table_ptr + row.to(tl.int64) * stride_table
            # Slots that hold no entry stand for the nearest that does: loads need no masks, and
            # nothing unwritten meets the products. Block ids are loaded one turn ahead by hand:
            # the pipeliner would spend a stage of buffers on them.
            entry = tl.maximum(tl.minimum(begin + tl.arange(0, ENTRIES), end - 1), OVERLAP - 1)
            block = tl.load(table + entry // PER_PAGE).to(tl.int64)
            for start in range(begin, end, ENTRIES):
                slots = start + tl.arange(0, ENTRIES)
                in_page = tl.maximum(tl.minimum(slots, end - 1), OVERLAP - 1) % PER_PAGE
                after = tl.minimum(slots + ENTRIES, end - 1)
                following = tl.load(table + after // PER_PAGE)
                at = block * stride_kn + in_page * stride_ke
                k = load_rows(k_head, at, dk, DK, DK_PAD)
                scores = tl.dot(q, k.T, input_precision="ieee") * scale
                stored = (slots >= OVERLAP - 1) & (slots < end)
                if SINGLE:
                    scores += tl.where(stored, 0.0, float("-inf"))[None, :]
                else:
                    visible = stored[None, :] & (slots[None, :] < last_slot[:, None])
                    scores = tl.where(visible, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(scores - shift[:, None])  # [ROWS, ENTRIES]
                decay = tl.exp2(top - shift)
                by_page = tl.reshape(p, [ROWS, PAGES, PER_PAGE])
                whole = tl.sum(by_page, 2)
                total = total * decay[:, None] + whole
                top = new_top
                if WITH_OUTPUT:
                    # Addresses are a good part of the loop: keys' serve for values too.
                    if not ALIKE:
                        at = block * stride_vn + in_page * stride_ve
                    v = load_rows(v_head, at, dv, DV, DV_PAD)
                    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
                if any_scored:
                    # An entry's l/d strides lie in its own block or in the one before.
                    prev = tl.sum(by_page * prev_weight[None, None, :], 2)
                    page = start // PER_PAGE + tl.arange(0, PAGES)
                    page_at = out_at[:, None] * num_pages + page[None, :]
                    keep = scored[:, None] & (page < num_pages)[None, :]
                    tl.store(own_ptr + page_at, OVERLAP * whole - prev, mask=keep)
                    tl.store(prev_ptr + page_at, prev, mask=keep)
                    tile = start // ENTRIES
                    tiles = tl.cdiv(num_pages, PAGES)
                    tl.store(tile_top_ptr + out_at * tiles + tile, new_top, mask=scored)
                block = following.to(tl.int64)
                done = ((start + ENTRIES) % size == 0) | (start + ENTRIES >= end)
                if done:
                    split_at = out_at * SPLITS + start // size
                    tl.store(max_ptr + split_at, top, mask=live)
                    tl.store(sum_ptr + split_at, tl.sum(total, 1), mask=live)
                    if WITH_OUTPUT:
                        keep = live[:, None] & (dv < DV)[None, :]
                        tl.store(acc_ptr + split_at[:, None] * DV + dv[None, :], acc, mask=keep)
                # The next split starts from an empty softmax; its first decay empties the sums.
                top = tl.where(done, float("-inf"), top)
