"""Decode-time selected and window attention in one pass over their pages, gates in the epilogue.

A program takes a share of one token's pages for one KV head: first the window's, then the selected
ones below the window. A page in both is read once and feeds two softmax states. With one share the
same program applies the gates; with more, a second launch merges the shares first. The number of
shares is fixed, so a row's bytes do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .context_splits import LOG2_E, fitting_stages
from .paged_tiles import tier_of

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class SparseTiles:
    """Sizes of the decode kernel: ``shares`` fixes how a token's pages are divided."""

    shares: int = 4
    warps: int = 4
    stages: int = 3
    merge_warps: int = 4
    merge_heads: int = 4


TILES = SparseTiles()


@triton.jit
def _update(scores, seen, v, top, total, acc):
    """One online-softmax step in base 2 over a tile of keys; rows without a key stay empty."""
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total * decay + tl.sum(p, 1), acc


@triton.jit
def _normalise(acc, total):
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _gate(logit_ptr, live):
    logit = tl.load(logit_ptr, mask=live, other=0.0).to(tl.float32)
    return (1.0 / (1.0 + tl.exp2(-1.4426950408889634 * logit)))[:, None]


@triton.jit
def _finish(
    selected,  # [heads, DV] fp32, normalised
    window,
    out_ptr,
    out_compressed_ptr,
    gate_ptr,
    token,
    heads,
    live,
    stride_ct,
    stride_ch,
    stride_gt,
    stride_gh,
    stride_gc,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    GATED: tl.constexpr,
    COMPRESSED: tl.constexpr,
):
    """Gate the branches of some heads of a token and store them."""
    dv = tl.arange(0, DV_PAD)
    keep = live[:, None] & (dv < DV)[None, :]
    if GATED:
        gate = gate_ptr + token.to(tl.int64) * stride_gt + heads * stride_gh
        out = selected * _gate(gate + stride_gc, live) + window * _gate(gate + 2 * stride_gc, live)
        if COMPRESSED:
            at = token.to(tl.int64) * stride_ct + heads[:, None] * stride_ch + dv[None, :]
            compressed = tl.load(out_compressed_ptr + at, mask=keep, other=0.0).to(tl.float32)
            out += compressed * _gate(gate, live)
    else:
        out = selected
    at = (token.to(tl.int64) * HQ + heads)[:, None] * DV + dv[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _page_of_visit(
    visit,
    end_visit,
    first_window,
    window_pages,
    chosen_ptr,
    resolved_ptr,
    table,
    RESOLVED: tl.constexpr,
):
    """(page, device slot) of a visit: the window's pages in order, then those chosen below it."""
    live = visit < end_visit
    in_window = visit < window_pages
    place = tl.maximum(visit - window_pages, 0)
    below = live & (visit >= window_pages)
    page = tl.load(chosen_ptr + place, mask=below, other=0)
    page = tl.where(in_window, first_window + visit, page)
    if RESOLVED:
        slot = tl.load(table + page, mask=live & in_window, other=0)
        slot += tl.load(resolved_ptr + place, mask=below, other=0)
    else:
        slot = tl.load(table + page, mask=live, other=0)
    return page, slot.to(tl.int64)


@triton.jit
def _attend_pages(
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [S, Hkv, P, Dk]
    v_ptr,  # [S, Hkv, P, Dv]
    host_k_ptr,  # where tiered: page i is slot S + i
    host_v_ptr,
    num_slots,  # S
    selection_ptr,  # [T, Hkv, n]
    slots_ptr,  # [T, Hkv, n], where resolved
    positions_ptr,  # [T]
    token_rows_ptr,  # [T]
    slot_table_ptr,  # [B, M]
    out_ptr,  # [T, Hq, Dv]
    out_compressed_ptr,  # [T, Hq, Dv]
    gate_ptr,  # [T, Hq, 3]
    max_ptr,  # [T, Hq, shares, 2]
    sum_ptr,
    acc_ptr,  # [T, Hq, shares, 2, Dv]
    scale,
    stride_qt,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_kp,
    stride_vn,
    stride_vh,
    stride_vp,
    stride_table,
    stride_ct,
    stride_ch,
    stride_gt,
    stride_gh,
    stride_gc,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    SHARES: tl.constexpr,
    GATED: tl.constexpr,
    COMPRESSED: tl.constexpr,
    RESOLVED: tl.constexpr,
    TIERED: tl.constexpr,
):
    GROUP: tl.constexpr = HQ // HKV
    head = tl.program_id(0)
    share = tl.program_id(1)
    token = tl.program_id(2)
    position = tl.load(positions_ptr + token).to(tl.int32)
    row = tl.load(token_rows_ptr + token)
    in_group = tl.arange(0, ROWS)
    live = in_group < GROUP
    heads = head * GROUP + in_group
    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    keys = tl.arange(0, PAGE)
    chosen_at = (token.to(tl.int64) * HKV + head) * SELECTED
    places = tl.arange(0, SELECTED_PAD)
    chosen = tl.load(selection_ptr + chosen_at + places, mask=places < SELECTED, other=-1)
    current = position // PAGE
    if GATED:
        first_window = tl.maximum(position - WINDOW + 1, 0) // PAGE
        window_pages = current - first_window + 1
        below = tl.sum(((chosen >= 0) & (chosen < first_window)).to(tl.int32), 0)
    else:
        first_window = current * 0
        window_pages = current * 0
        below = tl.sum((chosen >= 0).to(tl.int32), 0)
    visits = tl.where(position < 0, 0, window_pages + below)
    each = tl.cdiv(visits, SHARES)
    q_at = token.to(tl.int64) * stride_qt + heads * stride_qh
    q = tl.load(
        q_ptr + q_at[:, None] + dk[None, :],
        mask=live[:, None] & (dk < DK)[None, :],
        other=0.0,
    )  # [ROWS, DK]
    top_s = tl.full([ROWS], float("-inf"), tl.float32)
    sum_s = tl.zeros([ROWS], tl.float32)
    acc_s = tl.zeros([ROWS, DV_PAD], tl.float32)
    top_w = tl.full([ROWS], float("-inf"), tl.float32)
    sum_w = tl.zeros([ROWS], tl.float32)
    acc_w = tl.zeros([ROWS, DV_PAD], tl.float32)
    table = slot_table_ptr + row.to(tl.int64) * stride_table
    first_visit = share * each
    end_visit = tl.minimum(first_visit + each, visits)
    chosen_ptr = selection_ptr + chosen_at
    resolved_ptr = slots_ptr + chosen_at
    # Pages are looked up one turn ahead by hand: the pipeliner would spend stages of buffers on it.
    page, slot = _page_of_visit(
        first_visit, end_visit, first_window, window_pages, chosen_ptr, resolved_ptr, table,
        RESOLVED,
    )  # fmt: skip
    for visit in range(first_visit, end_visit):
        in_window = visit < window_pages
        next_page, next_slot = _page_of_visit(
            visit + 1, end_visit, first_window, window_pages, chosen_ptr, resolved_ptr, table,
            RESOLVED,
        )  # fmt: skip
        at = page * PAGE + keys
        written = at <= position
        k_pages, v_pages = k_ptr, v_ptr
        if TIERED:
            k_pages, _ = tier_of(k_ptr, host_k_ptr, slot, num_slots)
            v_pages, slot = tier_of(v_ptr, host_v_ptr, slot, num_slots)
        k = tl.load(
            k_pages + slot * stride_kn + head * stride_kh + keys[None, :] * stride_kp + dk[:, None],
            mask=written[None, :] & (dk < DK)[:, None],
            other=0.0,
        )  # [DK, PAGE]
        v = tl.load(
            v_pages + slot * stride_vn + head * stride_vh + keys[:, None] * stride_vp + dv[None, :],
            mask=written[:, None] & (dv < DV)[None, :],
            other=0.0,
        )  # [PAGE, DV]
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if GATED:
            selected = tl.sum((chosen == page).to(tl.int32), 0) > 0
            seen_w = written & (at > position - WINDOW) & in_window
            top_s, sum_s, acc_s = _update(
                scores, (written & selected)[None, :], v, top_s, sum_s, acc_s
            )
            top_w, sum_w, acc_w = _update(scores, seen_w[None, :], v, top_w, sum_w, acc_w)
        else:
            top_s, sum_s, acc_s = _update(scores, written[None, :], v, top_s, sum_s, acc_s)
        page, slot = next_page, next_slot
    if SHARES == 1:
        _finish(
            _normalise(acc_s, sum_s), _normalise(acc_w, sum_w), out_ptr, out_compressed_ptr,
            gate_ptr, token, heads, live, stride_ct, stride_ch, stride_gt, stride_gh, stride_gc,
            HQ, DV, DV_PAD, GATED, COMPRESSED,
        )  # fmt: skip
    else:
        at = ((token.to(tl.int64) * HQ + heads) * SHARES + share) * 2
        keep = live[:, None] & (dv < DV)[None, :]
        tl.store(max_ptr + at, top_s, mask=live)
        tl.store(sum_ptr + at, sum_s, mask=live)
        tl.store(acc_ptr + at[:, None] * DV + dv[None, :], acc_s, mask=keep)
        if GATED:
            tl.store(max_ptr + at + 1, top_w, mask=live)
            tl.store(sum_ptr + at + 1, sum_w, mask=live)
            tl.store(acc_ptr + (at + 1)[:, None] * DV + dv[None, :], acc_w, mask=keep)


@triton.jit
def _merged_branch(
    max_ptr,
    sum_ptr,
    acc_ptr,
    at,
    live,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The shares of one branch merged: [heads, DV]; ``at`` is each head's first share."""
    shares = tl.arange(0, SHARES)
    dv = tl.arange(0, DV_PAD)
    where = at[:, None] + 2 * shares[None, :]
    stored = live[:, None] & (shares < SHARES)[None, :]
    top = tl.load(max_ptr + where, mask=stored, other=float("-inf"))
    total = tl.load(sum_ptr + where, mask=stored, other=0.0)
    acc = tl.load(
        acc_ptr + where[:, :, None] * DV + dv[None, None, :],
        mask=stored[:, :, None] & (dv < DV)[None, None, :],
        other=0.0,
    )
    highest = tl.max(top, 1)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    return _normalise(tl.sum(acc * weight[:, :, None], 1), tl.sum(total * weight, 1))


@triton.jit
def _merge_shares(
    max_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,
    out_compressed_ptr,
    gate_ptr,
    stride_ct,
    stride_ch,
    stride_gt,
    stride_gh,
    stride_gc,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    GATED: tl.constexpr,
    COMPRESSED: tl.constexpr,
):
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    token = tl.program_id(1)
    live = heads < HQ
    at = (token.to(tl.int64) * HQ + heads) * SHARES * 2
    selected = _merged_branch(max_ptr, sum_ptr, acc_ptr, at, live, DV, DV_PAD, SHARES)
    window = selected
    if GATED:
        window = _merged_branch(max_ptr, sum_ptr, acc_ptr, at + 1, live, DV, DV_PAD, SHARES)
    _finish(
        selected, window, out_ptr, out_compressed_ptr, gate_ptr, token, heads, live,
        stride_ct, stride_ch, stride_gt, stride_gh, stride_gc, HQ, DV, DV_PAD, GATED, COMPRESSED,
    )  # fmt: skip


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
    shares = tiles.shares
    partial = (tokens, hq, shares, 2) if shares > 1 else (0,)
    top = q.new_empty(partial, dtype=torch.float32)
    total = torch.empty_like(top)
    acc = q.new_empty((*partial, dv) if shares > 1 else (0,), dtype=torch.float32)
    compressed = out if out_compressed is None else out_compressed
    branches = {"GATED": gate_logits is not None, "COMPRESSED": out_compressed is not None}
    gates = out if gate_logits is None else gate_logits
    slots = None if slots is None else slots.contiguous()
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    page_bytes = nsa.page * (dk_pad + dv_pad) * kv.k.element_size()
    host = kv.host or kv
    _attend_pages[hkv, shares, tokens](
        q, kv.k, kv.v, host.k, host.v, kv.k.shape[0],
        selection, selection if slots is None else slots,
        batch.positions, batch.token_rows, batch.slot_table, out, compressed, gates,
        top, total, acc, LOG2_E / dk**0.5,
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        batch.slot_table.stride(0), compressed.stride(0), compressed.stride(1), *gates.stride(),
        HQ=hq, HKV=hkv, DK=dk, DV=dv, DK_PAD=dk_pad, DV_PAD=dv_pad,
        ROWS=max(16, triton.next_power_of_2(hq // hkv)), PAGE=nsa.page, WINDOW=nsa.window,
        SELECTED=nsa.num_selected, SELECTED_PAD=triton.next_power_of_2(nsa.num_selected),
        SHARES=shares, RESOLVED=slots is not None, TIERED=kv.host is not None, **branches,
        num_warps=tiles.warps, num_stages=fitting_stages(tiles.stages, page_bytes),
    )  # fmt: skip
    if shares > 1:
        heads = min(tiles.merge_heads, triton.next_power_of_2(hq))
        _merge_shares[triton.cdiv(hq, heads), tokens](
            top, total, acc, out, compressed, gates,
            compressed.stride(0), compressed.stride(1), *gates.stride(),
            HQ=hq, DV=dv, DV_PAD=dv_pad, HEADS=heads, SHARES=shares, **branches,
            num_warps=tiles.merge_warps,
        )  # fmt: skip
    return out
