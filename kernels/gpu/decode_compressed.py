"""Decode-time compressed attention and block selection: split over the context, merged exactly.

Three launches. The first attends every split of the visible compressed entries and leaves, per
split, the (maximum, sum, accumulator) of its softmax and, per head and page, the logarithm of what
the page's entries give to their own block and to the one before it: 1/2 of the raw scores in size,
and free of the split's maximum. The second sums the group's block scores and takes the top n. The
third merges the splits; on its own, because it needs few registers and the selection many.

Splits follow from a row's context alone, so a row's bytes do not depend on its neighbours. How many
splits one program takes in turn follows from the whole batch and changes no byte. The grid is sized
by host-side bounds: a captured graph serves any context up to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import CompressedKV, NSAShape, StepBatch
from .context_splits import LOG2_E, fitting_stages, max_splits, merged_splits, size_of_split
from .decode_selection import num_entry_slots, select_of_chunks, select_of_pages, slots_of_token

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class CompressedTiles:
    """Sizes of the decode kernels. ``min_split`` and ``spread`` fix the split of a context."""

    tile_bytes: int = 64 << 10  # most of a tile of the inner loop ...
    entries: int = 128  # ... and most of its entries
    min_split: int = 256  # entries; a split is the smallest power of two times this ...
    spread: int = 16  # ... whose square is at least spread × the entries of the row
    warps: int = 4
    stages: int = 2
    query_rows: int = 64  # tokens × heads of one program, where a row has several tokens
    # A program's start costs as much as a tile or two, so it takes neighbouring splits, up to 8,
    # as long as this many programs are left: two waves of two on each of 132 multiprocessors.
    programs: int = 512
    max_programs: int = 2048  # beyond these a program takes several runs of splits in turn
    select_blocks: int = 1024  # blocks ranked by one program
    select_scores: int = 4096  # of one tile
    select_warps: int = 4
    merge_heads: int = 4
    scratch_bytes: int = 512 << 20


TILES = CompressedTiles()


@triton.jit
def _log2(x):
    """log2, with the zero's -inf written out: an empty page must stay out of every sum."""
    return tl.where(x > 0, tl.log2(tl.where(x > 0, x, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["num_rows", "first_token", "last_token"])
def _attend_splits(
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
    ROWS: tl.constexpr,  # TOKENS × G, padded
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    ENTRIES: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BATCH: tl.constexpr,  # rows, padded
    WITH_OUTPUT: tl.constexpr,
):
    GROUP: tl.constexpr = HQ // HKV
    PER_PAGE: tl.constexpr = PAGE // STRIDE
    OVERLAP: tl.constexpr = LEN // STRIDE
    PAGES: tl.constexpr = ENTRIES // PER_PAGE
    # Heads vary fastest: neighbouring programs read neighbouring runs of the same blocks.
    head = tl.program_id(0) % HKV
    token_tile = tl.program_id(0) // HKV
    # The splits that exist are numbered through all rows: a bound far above them costs nothing.
    every = tl.arange(0, BATCH)
    begins = tl.load(cu_seqlens_ptr + every, mask=every < num_rows, other=0)
    ends = tl.load(cu_seqlens_ptr + every + 1, mask=every < num_rows, other=0)
    contexts = tl.load(context_lens_ptr + every, mask=every < num_rows, other=0)
    slots_of_rows = num_entry_slots(contexts, LEN, STRIDE)
    counts = tl.cdiv(slots_of_rows, size_of_split(slots_of_rows, MIN_SPLIT, SPREAD))
    here = (begins < ends) & (ends > first_token) & (begins < last_token)
    counts = tl.where(here, counts, 0)
    run = 1  # splits of one item
    for _ in tl.static_range(3):
        run = tl.where(tl.sum(counts, 0) * HKV >= 2 * run * PROGRAMS, 2 * run, run)
    counts = tl.cdiv(counts, run)
    numbered = tl.cumsum(counts, 0)  # runs of the rows up to each
    rows = tl.arange(0, ROWS)
    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    slot_in_page = tl.arange(0, PER_PAGE)
    own_weight = tl.minimum(slot_in_page + 1, OVERLAP).to(tl.float32)
    prev_weight = tl.maximum(OVERLAP - 1 - slot_in_page, 0).to(tl.float32)
    for item in range(tl.program_id(1), tl.sum(counts, 0), tl.num_programs(1)):
        row = tl.sum((numbered <= item).to(tl.int32), 0)
        place = item - tl.sum(tl.where(every < row, counts, 0), 0)
        row_first = tl.load(cu_seqlens_ptr + row)
        row_last = tl.load(cu_seqlens_ptr + row + 1)
        num_slots = num_entry_slots(tl.load(context_lens_ptr + row), LEN, STRIDE)
        size = size_of_split(num_slots, MIN_SPLIT, SPREAD)
        begin = place * run * size
        end = tl.minimum(begin + run * size, num_slots)
        tokens = row_first + token_tile * TOKENS + rows // GROUP
        live = (rows < TOKENS * GROUP) & (tokens < row_last)
        live &= (tokens >= first_token) & (tokens < last_token)
        if tl.sum(live.to(tl.int32), 0) > 0:
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
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DV_PAD], tl.float32)
            k_head = k_ptr + head * stride_kh
            v_head = v_ptr + head * stride_vh
            table = block_table_ptr + row.to(tl.int64) * stride_table
            # Block ids are loaded one turn ahead by hand: the pipeliner would spend a stage of
            # buffers on them.
            slots = begin + tl.arange(0, ENTRIES)
            block = tl.load(table + slots // PER_PAGE, mask=slots < end, other=0).to(tl.int64)
            for start in range(begin, end, ENTRIES):
                slots = start + tl.arange(0, ENTRIES)
                stored = (slots >= OVERLAP - 1) & (slots < end)
                in_page = slots % PER_PAGE
                following = tl.load(
                    table + (slots + ENTRIES) // PER_PAGE, mask=slots + ENTRIES < end, other=0
                )
                k = tl.load(
                    k_head + (block * stride_kn + in_page * stride_ke)[None, :] + dk[:, None],
                    mask=stored[None, :] & (dk < DK)[:, None],
                    other=0.0,
                )  # [DK, ENTRIES]
                scores = tl.dot(q, k, input_precision="ieee") * scale
                visible = stored[None, :] & (slots[None, :] < last_slot[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(scores - shift[:, None])  # [ROWS, ENTRIES]
                decay = tl.exp2(top - shift)
                total = total * decay + tl.sum(p, 1)
                top = new_top
                if WITH_OUTPUT:
                    v = tl.load(
                        v_head + (block * stride_vn + in_page * stride_ve)[:, None] + dv[None, :],
                        mask=stored[:, None] & (dv < DV)[None, :],
                        other=0.0,
                    )  # [ENTRIES, DV]
                    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
                if any_scored:
                    by_page = tl.reshape(p, [ROWS, PAGES, PER_PAGE])
                    own = tl.sum(by_page * own_weight[None, None, :], 2)
                    prev = tl.sum(by_page * prev_weight[None, None, :], 2)
                    page = start // PER_PAGE + tl.arange(0, PAGES)
                    at = out_at[:, None] * num_pages + page[None, :]
                    keep = scored[:, None] & (page < num_pages)[None, :]
                    tl.store(own_ptr + at, _log2(own) + shift[:, None], mask=keep)
                    tl.store(prev_ptr + at, _log2(prev) + shift[:, None], mask=keep)
                block = following.to(tl.int64)
                done = ((start + ENTRIES) % size == 0) | (start + ENTRIES >= end)
                if done:
                    split_at = out_at * SPLITS + start // size
                    tl.store(max_ptr + split_at, top, mask=live)
                    tl.store(sum_ptr + split_at, total, mask=live)
                    if WITH_OUTPUT:
                        keep = live[:, None] & (dv < DV)[None, :]
                        tl.store(acc_ptr + split_at[:, None] * DV + dv[None, :], acc, mask=keep)
                # The next split starts from an empty softmax; its first decay empties the sums.
                top = tl.where(done, float("-inf"), top)


@triton.jit(do_not_specialize=["first_token"])
def _merge_splits(
    token_rows_ptr,
    positions_ptr,
    context_lens_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,  # [T, Hq, Dv]
    first_token,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    scratch_token = tl.program_id(1)
    token = first_token + scratch_token
    live = heads < HQ
    num_slots = slots_of_token(positions_ptr, token_rows_ptr, context_lens_ptr, token, LEN, STRIDE)
    num_splits = tl.cdiv(num_slots, size_of_split(num_slots, MIN_SPLIT, SPREAD))
    out = merged_splits(
        max_ptr, sum_ptr, acc_ptr, scratch_token.to(tl.int64) * HQ + heads, live, num_splits,
        DV, DV_PAD, SPLITS, SPLITS_PAD,
    )  # fmt: skip
    dv = tl.arange(0, DV_PAD)
    out_at = (token.to(tl.int64) * HQ + heads)[:, None] * DV + dv[None, :]
    keep = live[:, None] & (dv < DV)[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything the launches share, from host-side bounds alone."""

    hq: int
    hkv: int
    dv: int
    pages: int  # of the longest context
    splits: int
    tokens: int  # of one scratch, and of one pass
    chunk: int
    chunks: int


def _plan(
    q: Tensor, compressed: CompressedKV, batch: StepBatch, nsa: NSAShape, tiles: CompressedTiles
) -> _Plan:
    hq, hkv, dv = q.shape[1], compressed.k.shape[1], compressed.v.shape[3]
    pages = max(1, triton.cdiv(batch.max_context_len, nsa.page))
    splits = max_splits(pages * nsa.entries_per_page, tiles.min_split, tiles.spread)
    per_token = 4 * hq * (splits * (dv + 2) + 2 * pages)
    tokens = max(1, min(batch.num_tokens, tiles.scratch_bytes // per_token))
    chunk = min(tiles.select_blocks, max(16, triton.next_power_of_2(pages)))
    return _Plan(hq, hkv, dv, pages, splits, tokens, chunk, triton.cdiv(pages, chunk))


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Partial results of the tokens of one pass."""

    top: Tensor  # [tokens, Hq, splits] fp32, base 2
    total: Tensor  # [tokens, Hq, splits] fp32
    acc: Tensor  # [tokens, Hq, splits, Dv] fp32
    own: Tensor  # [tokens, Hq, pages] fp32, base 2
    prev: Tensor  # [tokens, Hq, pages] fp32, base 2
    keys: Tensor  # [tokens, Hkv, chunks, n] int32
    blocks: Tensor  # [tokens, Hkv, chunks, n] int32


def _scratch(plan: _Plan, device: torch.device, nsa: NSAShape, with_output: bool) -> _Scratch:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    heads = (plan.tokens, plan.hq)
    candidates = (plan.tokens, plan.hkv, plan.chunks, nsa.num_selected) if plan.chunks > 1 else (0,)
    return _Scratch(
        top=empty(*heads, plan.splits),
        total=empty(*heads, plan.splits),
        acc=empty(*heads, plan.splits, plan.dv) if with_output else empty(0),
        own=empty(*heads, plan.pages),
        prev=empty(*heads, plan.pages),
        keys=empty(*candidates, dtype=torch.int32),
        blocks=empty(*candidates, dtype=torch.int32),
    )


def _launch_splits(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    scratch: _Scratch,
    first: int,
    last: int,
    plan: _Plan,
    nsa: NSAShape,
    with_output: bool,
    tiles: CompressedTiles,
) -> None:
    k, v = compressed.k, compressed.v
    group, dk = plan.hq // plan.hkv, q.shape[2]
    tokens = min(batch.max_query_len, max(1, tiles.query_rows // group))
    across = plan.hkv * triton.cdiv(batch.max_query_len, tokens)
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(plan.dv)
    entry_bytes = (dk_pad + dv_pad) * k.element_size()
    fitting = max(16, tiles.tile_bytes // entry_bytes)
    entries = min(tiles.entries, 1 << (fitting.bit_length() - 1))  # a power of two
    entries = max(entries, nsa.entries_per_page)
    programs = min(batch.num_rows * plan.splits, max(1, tiles.max_programs // across))
    _attend_splits[across, programs](
        q, k, v, batch.positions, batch.cu_seqlens_q, batch.context_lens, batch.block_table,
        scratch.top, scratch.total, scratch.acc, scratch.own, scratch.prev,
        batch.num_rows, first, last, plan.pages, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], batch.block_table.stride(0),
        HQ=plan.hq, HKV=plan.hkv, DK=dk, DV=plan.dv,
        DK_PAD=dk_pad, DV_PAD=dv_pad, TOKENS=tokens,
        ROWS=max(16, triton.next_power_of_2(tokens * group)),
        LEN=nsa.compress_len, STRIDE=nsa.compress_stride, PAGE=nsa.page, SELECTED=nsa.num_selected,
        ENTRIES=entries, MIN_SPLIT=tiles.min_split,
        SPREAD=tiles.spread, SPLITS=plan.splits, PROGRAMS=tiles.programs,
        BATCH=max(32, triton.next_power_of_2(batch.num_rows)), WITH_OUTPUT=with_output,
        num_warps=tiles.warps,
        num_stages=fitting_stages(tiles.stages, entries * entry_bytes),
    )  # fmt: skip


def _launch_selection(
    batch: StepBatch,
    scratch: _Scratch,
    selection: Tensor,
    first: int,
    last: int,
    plan: _Plan,
    nsa: NSAShape,
    tiles: CompressedTiles,
) -> None:
    n, n_pad = nsa.num_selected, triton.next_power_of_2(nsa.num_selected)
    select_of_pages[plan.chunks, plan.hkv, last - first](
        batch.positions, batch.token_rows, batch.context_lens,
        scratch.top, scratch.total, scratch.own, scratch.prev,
        selection, scratch.keys, scratch.blocks, first, plan.pages,
        HQ=plan.hq, HKV=plan.hkv, LEN=nsa.compress_len, STRIDE=nsa.compress_stride, PAGE=nsa.page,
        SELECTED=n, SELECTED_PAD=n_pad, INITIAL=nsa.num_initial, LOCAL=nsa.num_local,
        MIN_SPLIT=tiles.min_split, SPREAD=tiles.spread, SPLITS=plan.splits,
        SPLITS_PAD=triton.next_power_of_2(plan.splits), CHUNK=plan.chunk, CHUNKS=plan.chunks,
        SCORES=tiles.select_scores, GROUP_PAD=triton.next_power_of_2(plan.hq // plan.hkv),
        num_warps=tiles.select_warps,
    )  # fmt: skip
    if plan.chunks > 1:
        candidates = plan.chunks * n
        select_of_chunks[plan.hkv, last - first](
            scratch.keys, scratch.blocks, selection, first,
            HKV=plan.hkv, SELECTED=n, SELECTED_PAD=n_pad, CANDIDATES=candidates,
            CANDIDATES_PAD=triton.next_power_of_2(candidates), num_warps=1,
        )  # fmt: skip


def _launch_merge(
    batch: StepBatch,
    scratch: _Scratch,
    out: Tensor,
    first: int,
    last: int,
    plan: _Plan,
    nsa: NSAShape,
    tiles: CompressedTiles,
) -> None:
    heads = min(tiles.merge_heads, triton.next_power_of_2(plan.hq))
    _merge_splits[triton.cdiv(plan.hq, heads), last - first](
        batch.token_rows, batch.positions, batch.context_lens,
        scratch.top, scratch.total, scratch.acc, out, first,
        HQ=plan.hq, DV=plan.dv, DV_PAD=triton.next_power_of_2(plan.dv),
        LEN=nsa.compress_len, STRIDE=nsa.compress_stride,
        MIN_SPLIT=tiles.min_split, SPREAD=tiles.spread, SPLITS=plan.splits,
        SPLITS_PAD=triton.next_power_of_2(plan.splits), HEADS=heads, num_warps=4,
    )  # fmt: skip


def decode_compressed_attention(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool = True,
    tiles: CompressedTiles = TILES,
) -> tuple[Tensor | None, Tensor]:
    """Attention over the visible compressed entries and the blocks that its scores select.

    ``q`` [T, Hq, Dk] with 1 to 8 tokens a row; answers (out [T, Hq, Dv] or None, selection
    [T, Hkv, n] int32, ascending, padded with −1). Equations 7 to 10 of arXiv 2502.11089.
    Scratch is at most ``tiles.scratch_bytes``, or one token's: larger batches run in passes.
    """
    hkv = compressed.k.shape[1]
    per_page = nsa.entries_per_page
    check(
        q.shape[2] == compressed.k.shape[3], "q and compressed k differ in Dk", q=q, k=compressed.k
    )
    check(q.shape[1] % hkv == 0, "Hq must be a multiple of Hkv", q=q, k=compressed.k)
    check(per_page & (per_page - 1) == 0, "entries per page must be a power of two", nsa=nsa)
    plan = _plan(q, compressed, batch, nsa, tiles)
    check(triton.next_power_of_2(nsa.page) == nsa.page, "the page must be a power of two", nsa=nsa)
    out = q.new_empty((batch.num_tokens, plan.hq, plan.dv)) if with_output else None
    selection = q.new_empty((batch.num_tokens, hkv, nsa.num_selected), dtype=torch.int32)
    scratch = _scratch(plan, q.device, nsa, with_output)
    for first in range(0, batch.num_tokens, plan.tokens):
        last = min(first + plan.tokens, batch.num_tokens)
        _launch_splits(q, compressed, batch, scratch, first, last, plan, nsa, with_output, tiles)
        _launch_selection(batch, scratch, selection, first, last, plan, nsa, tiles)
        if out is not None:
            _launch_merge(batch, scratch, out, first, last, plan, nsa, tiles)
    return out, selection
