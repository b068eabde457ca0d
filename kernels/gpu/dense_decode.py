"""Dense attention of rows with few tokens: the context in splits, then the splits merged.

Splits of all rows are numbered on, and a bounded number of programs takes them in turn. So the work
is spread evenly whatever the contexts, and a captured graph, whose grid has to serve the longest
context, launches no idle programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shapes import PagedKV, StepBatch
from .context_splits import LOG2_E, fitting_stages, max_splits, merged_splits, size_of_split
from .online_softmax import fold_top, fold_values

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class DenseTiles:
    """Sizes of the kernels. ``min_split`` and ``spread`` fix the split of a context."""

    keys: int = 64  # of a turn of the inner loop
    min_split: int = 256  # keys; a split is the smallest power of two times this ...
    spread: int = 16  # ... whose square is at least spread × the context
    warps: int = 4
    stages: int = 3
    query_rows: int = 64  # tokens × heads of one program, where a row has several tokens
    max_programs: int = 2112  # 16 for each of Hopper's 132 multiprocessors
    merge_heads: int = 4
    scratch_bytes: int = 256 << 20


TILES = DenseTiles()


def attend_short_rows(
    q: Tensor,
    kv: PagedKV,
    batch: StepBatch,
    out: Tensor,
    *,
    longest: int,
    tiles: DenseTiles = TILES,
) -> None:
    """Fill ``out`` [T, Hq, Dv] for rows of at most ``longest`` tokens, and with 0 at padding.

    Partial results take at most ``tiles.scratch_bytes``, or one row's: more rows run in passes.
    """
    hq, dv = out.shape[1:]
    splits = max_splits(batch.max_context_len, tiles.min_split, tiles.spread)
    per_row = 4 * longest * hq * splits * (dv + 2)
    rows = max(1, min(batch.num_rows, tiles.scratch_bytes // per_row))
    top = q.new_empty(rows * longest, hq, splits, dtype=torch.float32)
    total = torch.empty_like(top)
    acc = q.new_empty(rows * longest, hq, splits, dv, dtype=torch.float32)
    for first in range(0, batch.num_rows, rows):
        last = min(first + rows, batch.num_rows)
        _launch_splits(q, kv, batch, (top, total, acc), first, last, longest, tiles)
        _launch_merge(batch, (top, total, acc), out, first, last, longest, tiles)


def _launch_splits(
    q: Tensor,
    kv: PagedKV,
    batch: StepBatch,
    scratch: tuple[Tensor, Tensor, Tensor],
    first: int,
    last: int,
    longest: int,
    tiles: DenseTiles,
) -> None:
    (_, hq, dk), hkv, dv, splits = q.shape, kv.k.shape[1], kv.v.shape[3], scratch[0].shape[2]
    group = hq // hkv
    tokens = min(longest, max(1, tiles.query_rows // group))
    across = hkv * triton.cdiv(longest, tokens)
    programs = min((last - first) * splits, max(1, tiles.max_programs // across))
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    tile_bytes = tiles.keys * (dk_pad + dv_pad) * kv.k.element_size()
    _attend_splits[across, programs](
        q, kv.k, kv.v, batch.positions, batch.cu_seqlens_q, batch.context_lens, batch.slot_table,
        *scratch, first, last, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        batch.slot_table.stride(0),
        HQ=hq, HKV=hkv, DK=dk, DV=dv, DK_PAD=dk_pad, DV_PAD=dv_pad,
        LONGEST=longest, TOKENS=tokens, ROWS=max(16, triton.next_power_of_2(tokens * group)),
        PAGE=kv.k.shape[2], KEYS=tiles.keys, MIN_SPLIT=tiles.min_split, SPREAD=tiles.spread,
        SPLITS=splits, BATCH=triton.next_power_of_2(last - first),
        num_warps=tiles.warps, num_stages=fitting_stages(tiles.stages, tile_bytes),
    )  # fmt: skip


def _launch_merge(
    batch: StepBatch,
    scratch: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    first: int,
    last: int,
    longest: int,
    tiles: DenseTiles,
) -> None:
    hq, dv = out.shape[1:]
    heads, splits = min(tiles.merge_heads, triton.next_power_of_2(hq)), scratch[0].shape[2]
    _merge_kernel[batch.num_tokens, triton.cdiv(hq, heads)](
        *scratch, out, batch.positions, batch.token_rows, batch.cu_seqlens_q, batch.context_lens,
        first, last,
        HQ=hq, DV=dv, DV_PAD=triton.next_power_of_2(dv), HEADS=heads, LONGEST=longest,
        MIN_SPLIT=tiles.min_split, SPREAD=tiles.spread,
        SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip


@triton.jit
def page_slots(table, keys, end, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Device slots [KEYS] of the pages of neighbouring ``keys``; 0 from ``end`` on."""
    if PAGE % KEYS == 0:
        first = tl.min(keys, 0)
        return tl.load(table + first // PAGE, mask=first < end, other=0) + tl.zeros_like(keys)
    else:
        return tl.load(table + keys // PAGE, mask=keys < end, other=0)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def _attend_splits(
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [S, Hkv, P, Dk]
    v_ptr,  # [S, Hkv, P, Dv]
    positions_ptr,  # [T]
    cu_seqlens_ptr,  # [B+1]
    context_lens_ptr,  # [B]
    table_ptr,  # [B, M]
    max_ptr,  # [rows · LONGEST, Hq, splits]
    sum_ptr,
    acc_ptr,  # [rows · LONGEST, Hq, splits, Dv]
    first_row,
    last_row,
    scale,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_kp,
    stride_vs,
    stride_vh,
    stride_vp,
    stride_table,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    LONGEST: tl.constexpr,  # tokens of a row that is served here
    TOKENS: tl.constexpr,  # of a row, in one program
    ROWS: tl.constexpr,  # TOKENS × G, padded
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
):
    GROUP: tl.constexpr = HQ // HKV
    head = tl.program_id(0) % HKV
    first_token = tl.program_id(0) // HKV * TOKENS
    every = first_row + tl.arange(0, BATCH)
    contexts = tl.load(context_lens_ptr + every, mask=every < last_row, other=0)
    begins = tl.load(cu_seqlens_ptr + every, mask=every < last_row, other=0)
    ends = tl.load(cu_seqlens_ptr + every + 1, mask=every < last_row, other=0)
    counts = tl.cdiv(contexts, size_of_split(contexts, MIN_SPLIT, SPREAD))
    counts = tl.where(ends - begins <= LONGEST, counts, 0)
    numbered = tl.cumsum(counts, 0)  # splits of the rows up to each
    members = tl.arange(0, ROWS)
    heads = head * GROUP + members % GROUP
    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    for item in range(tl.program_id(1), tl.sum(counts, 0), tl.num_programs(1)):
        row = first_row + tl.sum((numbered <= item).to(tl.int32), 0)
        split = item - tl.sum(tl.where(every < row, counts, 0), 0)
        context = tl.load(context_lens_ptr + row)
        size = size_of_split(context, MIN_SPLIT, SPREAD)
        end = tl.minimum(split * size + size, context)
        in_row = first_token + members // GROUP
        tokens = tl.load(cu_seqlens_ptr + row) + in_row
        live = (members < TOKENS * GROUP) & (tokens < tl.load(cu_seqlens_ptr + row + 1))
        positions = tl.load(positions_ptr + tokens, mask=live, other=-1).to(tl.int32)
        q = tl.load(
            q_ptr + tokens.to(tl.int64)[:, None] * stride_qt + heads[:, None] * stride_qh + dk,
            mask=live[:, None] & (dk < DK)[None, :],
            other=0.0,
        )  # [ROWS, DK_PAD]
        table = table_ptr + row.to(tl.int64) * stride_table
        keys = split * size + tl.arange(0, KEYS)
        slots = page_slots(table, keys, end, PAGE, KEYS)
        top = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DV_PAD], tl.float32)
        for _ in range(split * size, end, KEYS):
            here = slots.to(tl.int64)
            # Read one turn ahead: a page's address is known when its turn comes.
            slots = page_slots(table, keys + KEYS, end, PAGE, KEYS)
            at = here * stride_ks + head * stride_kh + keys % PAGE * stride_kp
            written = keys < end
            k = tl.load(
                k_ptr + at[None, :] + dk[:, None],
                mask=written[None, :] & (dk < DK)[:, None],
                other=0.0,
            )  # [DK_PAD, KEYS]
            s = tl.dot(q, k, input_precision="ieee")
            seen = written[None, :] & (keys[None, :] <= positions[:, None])
            p, alpha, top, total = fold_top(tl.where(seen, s, float("-inf")), scale, top, total)
            at = here * stride_vs + head * stride_vh + keys % PAGE * stride_vp
            v = tl.load(
                v_ptr + at[:, None] + dv[None, :],
                mask=written[:, None] & (dv < DV)[None, :],
                other=0.0,
            )  # [KEYS, DV_PAD]
            acc = fold_values(p, v, alpha, acc)
            keys += KEYS
        line = (row - first_row).to(tl.int64) * LONGEST + in_row
        at = (line * HQ + heads) * SPLITS + split
        tl.store(max_ptr + at, top, mask=live)
        tl.store(sum_ptr + at, total, mask=live)
        keep = live[:, None] & (dv < DV)[None, :]
        tl.store(acc_ptr + at[:, None] * DV + dv[None, :], acc, mask=keep)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def _merge_kernel(
    max_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,  # [T, Hq, Dv]
    positions_ptr,
    token_rows_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    first_row,
    last_row,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    LONGEST: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """HEADS heads of one token, if its row is one of this pass."""
    token = tl.program_id(0)
    position = tl.load(positions_ptr + token)
    row = tl.load(token_rows_ptr + token)
    begin = tl.load(cu_seqlens_ptr + row)
    short = tl.load(cu_seqlens_ptr + row + 1) - begin <= LONGEST
    # Padding belongs to no row of its own: every pass gives it the same 0.
    if (position < 0) | (short & (row >= first_row) & (row < last_row)):
        context = tl.where(position < 0, 0, tl.load(context_lens_ptr + row))
        num_splits = tl.cdiv(context, size_of_split(context, MIN_SPLIT, SPREAD))
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        live = heads < HQ
        line = (row - first_row).to(tl.int64) * LONGEST + token - begin
        out = merged_splits(
            max_ptr, sum_ptr, acc_ptr, line * HQ + heads, live, num_splits,
            DV, DV_PAD, SPLITS, SPLITS_PAD,
        )  # fmt: skip
        dv = tl.arange(0, DV_PAD)
        to = out_ptr + (token.to(tl.int64) * HQ + heads)[:, None] * DV + dv[None, :]
        keep = live[:, None] & (dv < DV)[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=keep)
