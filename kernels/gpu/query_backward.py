"""Gradient of queries through selected and window attention: tiles as in their forward passes.

Probabilities are made again from the LSE, which holds the gate: a gated branch's probabilities sum
to its gate. Both branches add to one accumulator.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..shapes import BranchStats, NSAShape, PagedKV, StepBatch
from .page_union import SLOT_BITS, SLOT_MASK, TOKEN_MASK, PageUnion, unite_pages
from .paged_tiles import described, load_page, load_queries, page_operand, page_rows
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile, sparse_gradient_tile

Tensor = torch.Tensor


def query_backward(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    d_out: Tensor,
    selected: BranchStats | None,
    window: BranchStats | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile | None = None,
    union: PageUnion | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """dq [T, Hq, Dk] of the branches whose statistics are given; pages lie packed in ``kv``.

    ``union`` as of ``sparse_pass``.
    """
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = kv.v.shape[1], kv.v.shape[3]
    group = num_q_heads // num_kv_heads
    tile = tile or sparse_gradient_tile(group, max(dk, dv))
    if descriptors is None:
        descriptors = described(kv)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    if union is None:
        union = unite_pages(selection, None, batch, nsa=nsa, tile_tokens=tile.tokens)
    else:
        union.check_tiles(num_tiles)
    dq = q.new_empty(q.shape)
    first, second = selected or window, window or selected
    assert first is not None
    assert second is not None
    _query_kernel[(num_tiles, num_kv_heads)](
        q,
        d_out,
        page_operand(kv.k, descriptors),
        page_operand(kv.v, descriptors),
        union.items,
        union.counts,
        union.near_bits,
        batch.cu_seqlens_q,
        first.lse,
        first.delta,
        second.lse,
        second.delta,
        dq,
        math.log2(math.e) / math.sqrt(dk),
        1 / math.sqrt(dk),
        num_tokens,
        batch.num_rows,
        q.stride(0),
        q.stride(1),
        d_out.stride(0),
        d_out.stride(1),
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        HKV=num_kv_heads,
        G=group,
        DK=dk,
        DV=dv,
        BLOCK_DK=triton.next_power_of_2(dk),
        BLOCK_DV=triton.next_power_of_2(dv),
        P=nsa.page,
        BP=page_rows(nsa.page),
        BT=tile.tokens,
        BM=tile.rows,
        WINDOW=nsa.window,
        ITEMS=union.items.shape[2],
        NEAR=union.near_bits.shape[2],
        SELECTED=selected is not None,
        WINDOWED=window is not None,
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq


@triton.jit
def _score_gradient(s, d_p, lse, delta, scale):
    """Gradient of raw scores ``s`` [BM, BP], but for the scale; 0 where they are -inf."""
    return tl.exp2(s * scale - lse[:, None]) * (d_p - delta[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _query_kernel(
    q_ptr,
    d_out_ptr,
    k_source,
    v_source,
    items_ptr,
    counts_ptr,
    near_ptr,
    cu_ptr,
    lse_s_ptr,
    delta_s_ptr,
    lse_w_ptr,
    delta_w_ptr,
    dq_ptr,
    scale_log2,
    scale,
    num_tokens,
    num_rows,
    q_stride_t,
    q_stride_h,
    d_stride_t,
    d_stride_h,
    k_stride_s,
    k_stride_h,
    k_stride_p,
    v_stride_s,
    v_stride_h,
    v_stride_p,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    WINDOW: tl.constexpr,
    ITEMS: tl.constexpr,
    NEAR: tl.constexpr,
    SELECTED: tl.constexpr,
    WINDOWED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BT tokens x G heads of one KV head; rows are token-major."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    rows = tl.arange(0, BM)
    tokens = token0 + rows // G
    heads = head * G + rows % G
    valid = (rows < BT * G) & (tokens < end)
    begin = tl.load(cu_ptr + row)
    base = begin // P
    positions = tokens - begin
    near = (token0 - begin) // P
    keys = tl.arange(0, BP)
    inside = keys[None, :] < P
    q = load_queries(q_ptr, tokens, heads, valid, q_stride_t, q_stride_h, DK, BLOCK_DK)
    d_out = load_queries(d_out_ptr, tokens, heads, valid, d_stride_t, d_stride_h, DV, BLOCK_DV)
    index = tokens.to(tl.int64) * (HKV * G) + heads
    line = tile.to(tl.int64) * HKV + head
    dq = tl.zeros([BM, BLOCK_DK], tl.float32)
    # Probabilities made from +inf are 0.
    if WINDOWED:
        lse_w = tl.load(lse_w_ptr + index, mask=valid, other=float("inf"))
        delta_w = tl.load(delta_w_ptr + index, mask=valid, other=0.0)
        for page in tl.range(tl.maximum(token0 - begin - (WINDOW - 1), 0) // P, near,
                             num_stages=STAGES):  # fmt: skip
            k = load_page(k_source, base + page, head, k_stride_s, k_stride_h, k_stride_p,
                          P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
            s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BP]
            v = load_page(v_source, base + page, head, v_stride_s, v_stride_h, v_stride_p,
                          P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
            d_p = tl.dot(d_out, v.T, input_precision="ieee")
            seen = page * P + keys[None, :] > (positions - WINDOW)[:, None]
            s = tl.where(seen & inside, s, float("-inf"))
            d_s = _score_gradient(s, d_p, lse_w, delta_w, scale_log2)
            dq = tl.dot(d_s.to(k.dtype), k, dq, input_precision="ieee")
    if SELECTED:
        lse_s = tl.load(lse_s_ptr + index, mask=valid, other=float("inf"))
        delta_s = tl.load(delta_s_ptr + index, mask=valid, other=0.0)
        count = tl.load(counts_ptr + line)
        items = items_ptr + line * ITEMS
        upcoming = tl.load(items, mask=count > 0, other=0)
        for i in tl.range(0, count, num_stages=STAGES):
            # Read one turn ahead: the page's address is known when its own turn comes.
            item = upcoming
            upcoming = tl.load(items + i + 1, mask=i + 1 < count, other=0)
            slot = (item & SLOT_MASK).to(tl.int32)
            bits = ((item >> SLOT_BITS) & TOKEN_MASK).to(tl.int32)
            k = load_page(k_source, slot, head, k_stride_s, k_stride_h, k_stride_p,
                          P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
            s = tl.dot(q, k.T, input_precision="ieee")
            v = load_page(v_source, slot, head, v_stride_s, v_stride_h, v_stride_p,
                          P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
            d_p = tl.dot(d_out, v.T, input_precision="ieee")
            if P != BP:
                s = tl.where(inside, s, float("-inf"))
            hit = ((bits >> (rows // G)) & 1) != 0
            lse = tl.where(hit, lse_s, float("inf"))
            d_s = _score_gradient(s, d_p, lse, delta_s, scale_log2)
            dq = tl.dot(d_s.to(k.dtype), k, dq, input_precision="ieee")
    # Pages from ``near`` on hold keys after the first token.
    for page in tl.range(near, (tl.minimum(token0 + BT, end) - 1 - begin) // P + 1, num_stages=1):
        k = load_page(k_source, base + page, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        v = load_page(v_source, base + page, head, v_stride_s, v_stride_h, v_stride_p,
                      P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
        at = page * P + keys[None, :]
        s = tl.dot(q, k.T, input_precision="ieee")
        s = tl.where(inside & (at <= positions[:, None]), s, float("-inf"))
        d_p = tl.dot(d_out, v.T, input_precision="ieee")
        d_s = tl.zeros([BM, BP], tl.float32)
        if WINDOWED:
            windowed = tl.where(at > (positions - WINDOW)[:, None], s, float("-inf"))
            d_s += _score_gradient(windowed, d_p, lse_w, delta_w, scale_log2)
        if SELECTED:
            bits = tl.load(near_ptr + line * NEAR + page - near)
            lse = tl.where(((bits >> (rows // G)) & 1) != 0, lse_s, float("inf"))
            d_s += _score_gradient(s, d_p, lse, delta_s, scale_log2)
        dq = tl.dot(d_s.to(k.dtype), k, dq, input_precision="ieee")
    dims = tl.arange(0, BLOCK_DK)
    written = valid[:, None] & (dims[None, :] < DK)
    tl.store(dq_ptr + index[:, None] * DK + dims, (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=written)  # fmt: skip
