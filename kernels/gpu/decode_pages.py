"""Kernels of decode's selected and window attention: shares of a token's pages, and their merge."""

from __future__ import annotations

import triton
import triton.language as tl

from .context_splits import load_rows, overlap_launches
from .paged_tiles import tier_of


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
def _merged(top, total, acc, share_top, share_total, share_acc):
    """Two softmax states as one: [rows], [rows], [rows, Dv] each, in base 2."""
    new_top = tl.maximum(top, share_top)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay, weight = tl.exp2(top - shift), tl.exp2(share_top - shift)
    # Written as fused products, so that every launch rounds alike.
    total = tl.fma(total, decay, share_total * weight)
    acc = tl.fma(
        acc,
        tl.broadcast_to(decay[:, None], acc.shape),
        share_acc * weight[:, None],
    )
    return new_top, total, acc


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
def attend_pages(
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
    TAKEN: tl.constexpr,  # shares of one program
    ALIKE: tl.constexpr,  # keys and values have the same strides
    PDL: tl.constexpr,
):
    if PDL:
        overlap_launches()
    GROUP: tl.constexpr = HQ // HKV
    head = tl.program_id(0)
    first_share = tl.program_id(1) * TAKEN
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
    whole_top_s, whole_sum_s, whole_acc_s = top_s, sum_s, acc_s
    whole_top_w, whole_sum_w, whole_acc_w = top_w, sum_w, acc_w
    table = slot_table_ptr + row.to(tl.int64) * stride_table
    first_visit = first_share * each
    end_visit = tl.minimum(first_visit + TAKEN * each, visits)
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
        # Keys not written yet stand for the last that is: loads need no masks.
        offset = tl.minimum(keys, position - page * PAGE)
        k_pages, v_pages = k_ptr, v_ptr
        if TIERED:
            k_pages, _ = tier_of(k_ptr, host_k_ptr, slot, num_slots)
            v_pages, slot = tier_of(v_ptr, host_v_ptr, slot, num_slots)
        key_at = slot * stride_kn + head * stride_kh + offset * stride_kp
        k = load_rows(k_pages, key_at, dk, DK, DK_PAD)  # [PAGE, DK]
        if not ALIKE:
            key_at = slot * stride_vn + head * stride_vh + offset * stride_vp
        v = load_rows(v_pages, key_at, dv, DV, DV_PAD)  # [PAGE, DV]
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
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
        done = ((visit + 1) % each == 0) | (visit + 1 == end_visit)
        if done:
            if TAKEN == SHARES:
                whole_top_s, whole_sum_s, whole_acc_s = _merged(
                    whole_top_s, whole_sum_s, whole_acc_s, top_s, sum_s, acc_s
                )
                if GATED:
                    whole_top_w, whole_sum_w, whole_acc_w = _merged(
                        whole_top_w, whole_sum_w, whole_acc_w, top_w, sum_w, acc_w
                    )
            else:
                share_at = ((token.to(tl.int64) * HQ + heads) * SHARES + visit // each) * 2
                _store_share(
                    max_ptr, sum_ptr, acc_ptr, share_at, live, top_s, sum_s, acc_s, DV, DV_PAD
                )
                if GATED:
                    _store_share(
                        max_ptr, sum_ptr, acc_ptr, share_at + 1, live, top_w, sum_w, acc_w,
                        DV, DV_PAD,
                    )  # fmt: skip
        # The next share starts from an empty softmax; its first decay empties the sums.
        top_s = tl.where(done, float("-inf"), top_s)
        top_w = tl.where(done, float("-inf"), top_w)
    if TAKEN == SHARES:
        _finish(
            _normalise(whole_acc_s, whole_sum_s), _normalise(whole_acc_w, whole_sum_w), out_ptr,
            out_compressed_ptr, gate_ptr, token, heads, live, stride_ct, stride_ch,
            stride_gt, stride_gh, stride_gc, HQ, DV, DV_PAD, GATED, COMPRESSED,
        )  # fmt: skip
    else:
        # Where pages are few, the last shares have none.
        for share in range(first_share, first_share + TAKEN):
            if share * each >= visits:
                share_at = ((token.to(tl.int64) * HQ + heads) * SHARES + share) * 2
                tl.store(max_ptr + share_at, float("-inf"), mask=live)
                tl.store(max_ptr + share_at + 1, float("-inf"), mask=live)


@triton.jit
def _store_share(
    max_ptr, sum_ptr, acc_ptr, at, live, top, total, acc, DV: tl.constexpr, DV_PAD: tl.constexpr
):
    """An empty state is its maximum alone."""
    dv = tl.arange(0, DV_PAD)
    tl.store(max_ptr + at, top, mask=live)
    stored = live & (top > float("-inf"))
    tl.store(sum_ptr + at, total, mask=stored)
    keep = stored[:, None] & (dv < DV)[None, :]
    tl.store(acc_ptr + at[:, None] * DV + dv[None, :], acc, mask=keep)


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
    """The shares of one branch merged in order: [heads, DV]; ``at`` is each head's first share."""
    dv = tl.arange(0, DV_PAD)
    top = tl.full(at.shape, float("-inf"), tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    acc = tl.zeros([at.shape[0], DV_PAD], tl.float32)
    for share in tl.static_range(SHARES):
        share_at = at + 2 * share
        share_top = tl.load(max_ptr + share_at, mask=live, other=float("-inf"))
        # An empty share has no sums.
        stored = live & (share_top > float("-inf"))
        share_total = tl.load(sum_ptr + share_at, mask=stored, other=0.0)
        share_acc = tl.load(
            acc_ptr + share_at[:, None] * DV + dv[None, :],
            mask=stored[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        top, total, acc = _merged(top, total, acc, share_top, share_total, share_acc)
    return _normalise(acc, total)


@triton.jit
def merge_shares(
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
    PDL: tl.constexpr,
):
    if PDL:
        overlap_launches()
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
