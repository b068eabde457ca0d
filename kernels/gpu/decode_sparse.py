"""Decode-time selected and window attention in one pass over their pages, gates in the epilogue.

A token's pages are divided into shares: first the window's pages, then the selected ones below the
window. A page in both is read once and feeds two softmax states. A program takes one share or, as
the batch grows, several in turn; taking all, it merges them itself and applies the gates, else a
second launch does. The number of shares is fixed and they are merged in the same order by the same
operations, so a row's bytes do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .context_splits import LOG2_E, fitting_stages, overlaps_launches
from .decode_pages import attend_pages, merge_shares

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class SparseTiles:
    """Sizes of the decode kernel: ``shares`` fixes how a token's pages are divided."""

    shares: int = 8
    programs: int = 264  # at a time: two on each of an H200's multiprocessors
    warps: int = 4
    stages: int = 3
    merge_warps: int = 4
    merge_heads: int = 4


TILES = SparseTiles()


def _shares_taken(tokens: int, num_kv_heads: int, tiles: SparseTiles) -> int:
    """Shares of one program, a power of two: the fewest turns until all shares are done.

    A program's start costs about as much as a share.
    """
    choices = [1 << i for i in range(tiles.shares.bit_length())]
    shares = tokens * num_kv_heads * tiles.shares

    def turns(taken: int) -> int:
        return triton.cdiv(shares // taken, tiles.programs) * (taken + 1)

    return min(choices, key=turns)


def _check(q: Tensor, kv: PagedKV, selection: Tensor, batch: StepBatch, nsa: NSAShape) -> None:
    check(q.shape[2] == kv.k.shape[3], "q and k differ in Dk", q=q, k=kv.k)
    check(q.shape[1] % kv.k.shape[1] == 0, "Hq must be a multiple of Hkv", q=q, k=kv.k)
    check(kv.k.shape[2] == nsa.page, "the cache has another page", k=kv.k, P=nsa.page)
    check(triton.next_power_of_2(nsa.page) == nsa.page, "the page must be a power of two", nsa=nsa)
    expected = (batch.num_tokens, kv.k.shape[1], nsa.num_selected)
    check(selection.shape == expected, "selection must be [T, Hkv, n]", selection=selection)
    check(selection.is_contiguous(), "selection must be contiguous", selection=selection)


def decode_sparse_attention(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    out_compressed: Tensor | None,
    gate_logits: Tensor | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
    tiles: SparseTiles = TILES,
) -> Tensor:
    """Selected and window attention plus gates (equation 5 of arXiv 2502.11089): [T, Hq, Dv].

    ``selection`` [T, Hkv, n] int32; ``slots`` of the same shape are its device slots, else the slot
    table's. ``gate_logits`` [T, Hq, 3]; None means the selected branch alone. ``out_compressed``
    None leaves the compressed branch out.
    """
    _check(q, kv, selection, batch, nsa)
    (tokens, hq, dk), hkv, dv = q.shape, kv.k.shape[1], kv.v.shape[3]
    out = q.new_empty((tokens, hq, dv))
    shares, taken = tiles.shares, _shares_taken(tokens, hkv, tiles)
    partial = (tokens, hq, shares, 2) if taken < shares else (0,)
    top = q.new_empty(partial, dtype=torch.float32)
    total = torch.empty_like(top)
    acc = q.new_empty((*partial, dv) if taken < shares else (0,), dtype=torch.float32)
    compressed = out if out_compressed is None else out_compressed
    branches = {"GATED": gate_logits is not None, "COMPRESSED": out_compressed is not None}
    gates = out if gate_logits is None else gate_logits
    slots = None if slots is None else slots.contiguous()
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    page_bytes = nsa.page * (dk_pad + dv_pad) * kv.k.element_size()
    host = kv.host or kv
    pdl = overlaps_launches(tokens, q.device)
    attend_pages[hkv, shares // taken, tokens](
        q, kv.k, kv.v, host.k, host.v, kv.k.shape[0],
        selection, selection if slots is None else slots,
        batch.positions, batch.token_rows, batch.slot_table, out, compressed, gates,
        top, total, acc, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        batch.slot_table.stride(0), compressed.stride(0), compressed.stride(1), *gates.stride(),
        HQ=hq, HKV=hkv, DK=dk, DV=dv, DK_PAD=dk_pad, DV_PAD=dv_pad,
        ROWS=max(16, triton.next_power_of_2(hq // hkv)), PAGE=nsa.page, WINDOW=nsa.window,
        SELECTED=nsa.num_selected, SELECTED_PAD=triton.next_power_of_2(nsa.num_selected),
        SHARES=shares, TAKEN=taken, RESOLVED=slots is not None, TIERED=kv.host is not None,
        ALIKE=kv.k.stride() == kv.v.stride(), PDL=pdl, launch_pdl=pdl, **branches,
        num_warps=tiles.warps, num_stages=fitting_stages(tiles.stages, page_bytes),
    )  # fmt: skip
    if taken < shares:
        heads = min(tiles.merge_heads, triton.next_power_of_2(hq))
        merge_shares[triton.cdiv(hq, heads), tokens](
            top, total, acc, out, compressed, gates,
            compressed.stride(0), compressed.stride(1), *gates.stride(),
            HQ=hq, DV=dv, DV_PAD=dv_pad, HEADS=heads, SHARES=shares, **branches,
            PDL=pdl, launch_pdl=pdl,
            num_warps=tiles.merge_warps,
        )  # fmt: skip
    return out
