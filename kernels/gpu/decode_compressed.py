"""Decode-time compressed attention and block selection: split over the context, merged exactly.

Three launches. The first attends every split of the visible compressed entries (``decode_splits``).
The second scores blocks and merges the splits, the third takes the top n (``decode_selection``).
Where no context has more entries than a tile, one launch does it all (``decode_short``).

Splits follow from a row's context alone, so a row's bytes do not depend on its neighbours, unless
these decide that all are short. Which splits one program takes in turn follows from the whole batch
and changes no byte. The grid is sized by host-side bounds: a captured graph serves any context up
to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ..contracts import check
from ..shapes import CompressedKV, NSAShape, StepBatch
from .context_splits import LOG2_E, fitting_stages, max_splits, overlaps_launches
from .decode_selection import score_and_merge, select_of_chunks, select_of_keys
from .decode_short import attend_and_select
from .decode_splits import attend_splits

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class CompressedTiles:
    """Sizes of the decode kernels. ``min_split`` and ``spread`` fix the split of a context."""

    tile_bytes: int = 64 << 10  # most of a tile of the inner loop ...
    entries: int = 128  # ... and most of its entries
    min_split: int = 256  # entries; a split is the smallest power of two times this ...
    spread: int = 16  # ... whose square is at least spread x the entries of the row
    warps: int = 4
    stages: int = 2
    query_rows: int = 64  # tokens x heads of one program, where a row has several tokens
    programs: int = 264  # two on each of an H200's multiprocessors; they share all splits evenly
    score_blocks: int = 64  # blocks scored by one program in turn
    score_programs: int = 1024  # aimed at: several share a token's blocks and its heads
    score_parts: int = 16  # at most so many
    score_heads: int = 2  # merged by one program in turn; how many fixes the order of sums
    score_warps: int = 2
    select_blocks: int = 8192  # blocks ranked by one program
    select_warps: int = 4  # at least; one per 1,024 blocks
    short_entries: int = 128  # of the longest context, up to which one launch does it all
    short_warps: int = 4
    scratch_bytes: int = 512 << 20


TILES = CompressedTiles()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything the launches share, from host-side bounds alone."""

    hq: int
    hkv: int
    dv: int
    pages: int  # of the longest context
    splits: int
    entries: int  # of a tile
    tile_pages: int
    tokens: int  # of one scratch, and of one pass
    chunk: int
    chunks: int
    pdl: bool

    @property
    def group(self) -> int:
        return self.hq // self.hkv


def _tile_entries(head_dims: int, element_size: int, nsa: NSAShape, tiles: CompressedTiles) -> int:
    """Entries of a tile, a power of two; ``head_dims`` is Dk + Dv, padded."""
    fitting = max(16, tiles.tile_bytes // (head_dims * element_size))
    entries = min(tiles.entries, 1 << (fitting.bit_length() - 1))
    return max(entries, nsa.entries_per_page)


def _plan(
    q: Tensor, compressed: CompressedKV, batch: StepBatch, nsa: NSAShape, tiles: CompressedTiles
) -> _Plan:
    hq, hkv, dv = q.shape[1], compressed.k.shape[1], compressed.v.shape[3]
    pages = max(1, triton.cdiv(batch.max_context_len, nsa.page))
    splits = max_splits(pages * nsa.entries_per_page, tiles.min_split, tiles.spread)
    dims = triton.next_power_of_2(q.shape[2]) + triton.next_power_of_2(dv)
    entries = _tile_entries(dims, q.element_size(), nsa, tiles)
    per_token = 4 * hq * (splits * (dv + 2) + 3 * pages)
    tokens = max(1, min(batch.num_tokens, tiles.scratch_bytes // per_token))
    chunk = min(tiles.select_blocks, max(16, triton.next_power_of_2(pages)))
    return _Plan(
        hq=hq,
        hkv=hkv,
        dv=dv,
        pages=pages,
        splits=splits,
        entries=entries,
        tile_pages=entries // nsa.entries_per_page,
        tokens=tokens,
        chunk=chunk,
        chunks=triton.cdiv(pages, chunk),
        pdl=overlaps_launches(batch.num_tokens, q.device),
    )


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Partial results of the tokens of one pass."""

    top: Tensor  # [tokens, Hq, splits] fp32, base 2
    total: Tensor  # [tokens, Hq, splits] fp32
    acc: Tensor  # [tokens, Hq, splits, Dv] fp32
    own: Tensor  # [tokens, Hq, pages] fp32
    prev: Tensor  # [tokens, Hq, pages] fp32
    tile_top: Tensor  # [tokens, Hq, tiles] fp32, base 2
    keys: Tensor  # [tokens, Hkv, pages] int32
    chosen_keys: Tensor  # [tokens, Hkv, chunks, n] int32
    chosen: Tensor  # [tokens, Hkv, chunks, n] int32


def _scratch(plan: _Plan, device: torch.device, most: int, with_output: bool) -> _Scratch:
    """For lists of at most ``most`` blocks."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    heads = (plan.tokens, plan.hq)
    chosen = (plan.tokens, plan.hkv, plan.chunks, most) if plan.chunks > 1 else (0,)
    return _Scratch(
        top=empty(*heads, plan.splits),
        total=empty(*heads, plan.splits),
        acc=empty(*heads, plan.splits, plan.dv) if with_output else empty(0),
        own=empty(*heads, plan.pages),
        prev=empty(*heads, plan.pages),
        tile_top=empty(*heads, triton.cdiv(plan.pages, plan.tile_pages)),
        keys=empty(plan.tokens, plan.hkv, plan.pages, dtype=torch.int32),
        chosen_keys=empty(*chosen, dtype=torch.int32),
        chosen=empty(*chosen, dtype=torch.int32),
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
    k, v, dk = compressed.k, compressed.v, q.shape[2]
    tokens = min(batch.max_query_len, max(1, tiles.query_rows // plan.group))
    across = plan.hkv * triton.cdiv(batch.max_query_len, tokens)
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(plan.dv)
    programs = min(batch.num_rows * plan.splits, max(1, tiles.programs // across))
    tile_bytes = plan.entries * (dk_pad + dv_pad) * k.element_size()
    attend_splits[across, programs](
        q, k, v, batch.positions, batch.cu_seqlens_q, batch.context_lens, batch.block_table,
        scratch.top, scratch.total, scratch.acc, scratch.own, scratch.prev, scratch.tile_top,
        batch.num_rows, first, last, plan.pages, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], batch.block_table.stride(0),
        HQ=plan.hq, HKV=plan.hkv, DK=dk, DV=plan.dv,
        DK_PAD=dk_pad, DV_PAD=dv_pad, TOKENS=tokens,
        ROWS=max(16, triton.next_power_of_2(tokens * plan.group)),
        SINGLE=batch.max_query_len == 1,
        LEN=nsa.compress_len, STRIDE=nsa.compress_stride, PAGE=nsa.page, SELECTED=nsa.num_selected,
        ENTRIES=plan.entries, MIN_SPLIT=tiles.min_split,
        SPREAD=tiles.spread, SPLITS=plan.splits,
        BATCH=max(32, triton.next_power_of_2(batch.num_rows)), WITH_OUTPUT=with_output,
        ALIKE=k.stride() == v.stride(), PDL=plan.pdl, launch_pdl=plan.pdl,
        num_warps=tiles.warps,
        num_stages=fitting_stages(tiles.stages, tile_bytes),
    )  # fmt: skip


def _launch_scores(
    batch: StepBatch,
    scratch: _Scratch,
    out: Tensor | None,
    first: int,
    last: int,
    plan: _Plan,
    nsa: NSAShape,
    tiles: CompressedTiles,
) -> None:
    group_pad = triton.next_power_of_2(plan.group)
    wanted = triton.next_power_of_2(triton.cdiv(tiles.score_programs, plan.hkv * (last - first)))
    parts = min(tiles.score_parts, wanted)
    score_and_merge[parts, plan.hkv, last - first](
        batch.positions, batch.token_rows, batch.context_lens,
        scratch.top, scratch.total, scratch.acc, scratch.own, scratch.prev, scratch.tile_top,
        scratch.keys, scratch.acc if out is None else out, first, plan.pages,
        HQ=plan.hq, HKV=plan.hkv, DV=plan.dv, DV_PAD=triton.next_power_of_2(plan.dv),
        LEN=nsa.compress_len, STRIDE=nsa.compress_stride, PAGE=nsa.page,
        SELECTED=nsa.num_selected, INITIAL=nsa.num_initial, LOCAL=nsa.num_local,
        MIN_SPLIT=tiles.min_split, SPREAD=tiles.spread, SPLITS=plan.splits,
        SPLITS_PAD=triton.next_power_of_2(plan.splits), GROUP_PAD=group_pad,
        HEADS=min(tiles.score_heads, group_pad), CHUNK=tiles.score_blocks,
        PAGES=plan.tile_pages, SINGLE=batch.max_query_len == 1,
        WITH_OUTPUT=out is not None, PDL=plan.pdl, launch_pdl=plan.pdl,
        num_warps=tiles.score_warps,
    )  # fmt: skip


def _tile_sizes(chunk: int) -> int:
    """Powers of two from 128 to ``chunk`` blocks; 1 where that is smaller."""
    return max(1, chunk.bit_length() - 7)


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
    n, n_pad = selection.shape[2], triton.next_power_of_2(selection.shape[2])
    select_of_keys[plan.chunks, plan.hkv, last - first](
        batch.positions, scratch.keys, selection, scratch.chosen_keys, scratch.chosen,
        first, plan.pages,
        HKV=plan.hkv, PAGE=nsa.page, SELECTED=n, SELECTED_PAD=n_pad,
        CHUNK=plan.chunk, CHUNKS=plan.chunks, SIZES=_tile_sizes(plan.chunk),
        PDL=plan.pdl, launch_pdl=plan.pdl,
        num_warps=max(tiles.select_warps, plan.chunk // 1024),
    )  # fmt: skip
    if plan.chunks > 1:
        candidates = plan.chunks * n
        select_of_chunks[plan.hkv, last - first](
            scratch.chosen_keys, scratch.chosen, selection, first,
            HKV=plan.hkv, SELECTED=n, SELECTED_PAD=n_pad, CANDIDATES=candidates,
            CANDIDATES_PAD=triton.next_power_of_2(candidates), PDL=plan.pdl, launch_pdl=plan.pdl,
            num_warps=1,
        )  # fmt: skip


def _launch_short(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    out: Tensor | None,
    selection: Tensor,
    plan: _Plan,
    nsa: NSAShape,
    tiles: CompressedTiles,
) -> None:
    k, v, dk = compressed.k, compressed.v, q.shape[2]
    attend_and_select[plan.hkv, batch.num_tokens](
        q, k, v, batch.positions, batch.token_rows, batch.block_table,
        q if out is None else out, selection, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], batch.block_table.stride(0),
        HQ=plan.hq, HKV=plan.hkv, DK=dk, DV=plan.dv,
        DK_PAD=triton.next_power_of_2(dk), DV_PAD=triton.next_power_of_2(plan.dv),
        ROWS=max(16, triton.next_power_of_2(plan.group)),
        LEN=nsa.compress_len, STRIDE=nsa.compress_stride, PAGE=nsa.page,
        SELECTED=nsa.num_selected, SELECTED_PAD=triton.next_power_of_2(nsa.num_selected),
        INITIAL=nsa.num_initial, LOCAL=nsa.num_local,
        ENTRIES=max(16, triton.next_power_of_2(plan.pages * nsa.entries_per_page)),
        WITH_OUTPUT=out is not None, PDL=plan.pdl, launch_pdl=plan.pdl,
        num_warps=tiles.short_warps,
    )  # fmt: skip


def decode_compressed_attention(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool = True,
    ranked: Tensor | None = None,
    tiles: CompressedTiles = TILES,
) -> tuple[Tensor | None, Tensor]:
    """Attention over the visible compressed entries and the blocks that its scores select.

    ``q`` [T, Hq, Dk] with 1 to 8 tokens a row; answers (out [T, Hq, Dv] or None, selection
    [T, Hkv, n] int32, ascending, padded with −1). Equations 7 to 10 of arXiv 2502.11089.
    ``ranked`` [T, Hkv, m] int32, m ≥ n, is filled in that form with the m best blocks.
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
    most = min(plan.entries, tiles.short_entries)
    if ranked is None and batch.max_query_len == 1 and plan.pages * per_page <= most:
        _launch_short(q, compressed, batch, out, selection, plan, nsa, tiles)
        return out, selection
    lists = [selection] if ranked is None else [selection, ranked]
    scratch = _scratch(plan, q.device, lists[-1].shape[2], with_output)
    for first in range(0, batch.num_tokens, plan.tokens):
        last = min(first + plan.tokens, batch.num_tokens)
        _launch_splits(q, compressed, batch, scratch, first, last, plan, nsa, with_output, tiles)
        _launch_scores(batch, scratch, out, first, last, plan, nsa, tiles)
        for best in lists:
            _launch_selection(batch, scratch, best, first, last, plan, nsa, tiles)
    return out, selection
