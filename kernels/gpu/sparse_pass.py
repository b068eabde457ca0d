"""Selected attention of a prefill step, and the gated sum with the window and compressed branches.

Neighbouring tokens share a tile and the union of their selected pages, so that a page is fetched
once for all who want it. Pages before the tile's own (far) are wholly visible: a row that did not
select one is hidden by its exponent.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .online_softmax import fold_hits, fold_values, log_sum, normalised
from .page_union import SLOT_BITS, SLOT_MASK, TOKEN_MASK, PageUnion, unite_pages
from .paged_tiles import (
    described,
    load_gates,
    load_page,
    load_queries,
    load_tokens,
    page_operand,
    page_rows,
    tier_of,
)
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile, sparse_tile
from .window_pass import window_pass

Tensor = torch.Tensor


def fused_pass(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    out_compressed: Tensor | None,
    gate_logits: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
) -> Tensor:
    """Gated sum [T, Hq, Dv] of the branches: first the window pass, then the selected one adds."""
    out = window_pass(q, kv, batch, nsa=nsa, gate_logits=gate_logits, out_compressed=out_compressed)
    return sparse_pass(
        q, kv, selection, batch, nsa=nsa, slots=slots, gate_logits=gate_logits, out=out
    )


def sparse_pass(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
    gate_logits: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    tile: Tile | None = None,
    union: PageUnion | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Attention [T, Hq, Dv] over selected pages; with gates and ``out``: ``out`` + gate x that.

    ``lse`` [T, Hq] fp32, if given, gets log2 of the sums of exponentials. ``union`` is that of
    ``selection`` for the tile's tokens; None: it is made here.
    """
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = kv.v.shape[1], kv.v.shape[3]
    num_slots = kv.k.shape[0] + (0 if kv.host is None else kv.host.k.shape[0])
    check(num_slots <= 1 << SLOT_BITS.value, "more pages than listed slots can name", k=kv.k)
    tile = tile or sparse_tile(num_q_heads // num_kv_heads, max(dk, dv))
    if union is None:
        union = unite_pages(selection, slots, batch, nsa=nsa, tile_tokens=tile.tokens)
    else:
        union.check_tiles(num_query_tiles(num_tokens, batch.num_rows, tile.tokens))
    if out is None:
        out = q.new_empty(num_tokens, num_q_heads, dv)
    if descriptors is None:
        descriptors = described(kv) and kv.host is None
    _launch(q, kv, union, batch, nsa, gate_logits, out, lse, tile, descriptors)
    return out


def _launch(
    q: Tensor,
    kv: PagedKV,
    union: PageUnion,
    batch: StepBatch,
    nsa: NSAShape,
    gate_logits: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    tile: Tile,
    descriptors: bool,
) -> None:
    num_kv_heads = kv.k.shape[1]
    num_tiles = num_query_tiles(q.shape[0], batch.num_rows, tile.tokens)
    gates = out if gate_logits is None else gate_logits
    host = kv.host or kv
    _sparse_kernel[(num_tiles, num_kv_heads)](
        q,
        page_operand(kv.k, descriptors),
        page_operand(kv.v, descriptors),
        kv.v,
        host.k,
        host.v,
        kv.k.shape[0],
        union.items,
        union.counts,
        union.near_bits,
        batch.slot_table,
        batch.positions,
        batch.cu_seqlens_q,
        gates,
        out,
        out if lse is None else lse,
        math.log2(math.e) / math.sqrt(q.shape[2]),
        q.shape[0],
        batch.num_rows,
        q.stride(0),
        q.stride(1),
        batch.slot_table.stride(0),
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *gates.stride(),
        HKV=num_kv_heads,
        G=q.shape[1] // num_kv_heads,
        DK=kv.k.shape[3],
        DV=kv.v.shape[3],
        BLOCK_DK=triton.next_power_of_2(kv.k.shape[3]),
        BLOCK_DV=triton.next_power_of_2(kv.v.shape[3]),
        P=nsa.page,
        BP=page_rows(nsa.page),
        BT=tile.tokens,
        BM=tile.rows,
        ITEMS=union.items.shape[2],
        NEAR=union.near_bits.shape[2],
        GATED=gate_logits is not None,
        WITH_LSE=lse is not None,
        DESCRIPTORS=descriptors,
        TIERED=kv.host is not None,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _fold_page(q, k, v, hit, seen, scale, top, total, acc):
    """One page: ``hit`` [BM] the rows that want it, ``seen`` [BM or 1, BP] the keys they see."""
    s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BP]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    p, alpha, top, total = fold_hits(s, hit, scale, top, total)
    return top, total, fold_values(p, v, alpha, acc)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def _sparse_kernel(
    q_ptr,
    k_source,
    v_source,
    v_ptr,
    host_k_ptr,
    host_v_ptr,
    num_slots,
    items_ptr,
    counts_ptr,
    near_ptr,
    table_ptr,
    positions_ptr,
    cu_ptr,
    gates_ptr,
    out_ptr,
    lse_ptr,
    scale,
    num_tokens,
    num_rows,
    q_stride_t,
    q_stride_h,
    table_stride,
    k_stride_s,
    k_stride_h,
    k_stride_p,
    v_stride_s,
    v_stride_h,
    v_stride_p,
    gate_stride_t,
    gate_stride_h,
    gate_stride_c,
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
    ITEMS: tl.constexpr,
    NEAR: tl.constexpr,
    GATED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TIERED: tl.constexpr,
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
    first = tl.load(positions_ptr + token0).to(tl.int32)
    last = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32)
    keys = tl.arange(0, BP)
    inside = None
    if P != BP:
        inside = keys[None, :] < P
    line = tile.to(tl.int64) * HKV + head
    count = tl.load(counts_ptr + line)
    items = items_ptr + line * ITEMS
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    upcoming = tl.load(items, mask=count > 0, other=0)
    q = load_queries(q_ptr, tokens, heads, valid, q_stride_t, q_stride_h, DK, BLOCK_DK)
    if GATED:
        gate = load_gates(
            gates_ptr, tokens, heads, 1, valid, gate_stride_t, gate_stride_h, gate_stride_c
        )
    for i in tl.range(0, count, num_stages=STAGES):
        # Read one turn ahead: the page's address is known when its own turn comes.
        item = upcoming
        upcoming = tl.load(items + i + 1, mask=i + 1 < count, other=0)
        slot = (item & SLOT_MASK).to(tl.int32)
        bits = ((item >> SLOT_BITS) & TOKEN_MASK).to(tl.int32)
        k_pages, v_pages = k_source, v_source
        if TIERED:
            k_pages, _ = tier_of(k_source, host_k_ptr, slot, num_slots)
            v_pages, slot = tier_of(v_source, host_v_ptr, slot, num_slots)
        k = load_page(k_pages, slot, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        v = load_page(v_pages, slot, head, v_stride_s, v_stride_h, v_stride_p,
                      P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
        hit = ((bits >> (rows // G)) & 1) != 0
        top, total, acc = _fold_page(q, k, v, hit, inside, scale, top, total, acc)
    # Pages from ``near`` on hold keys after the first token, and perhaps unwritten ones.
    near = tl.maximum(first, 0) // P
    slot_table = table_ptr + row.to(tl.int64) * table_stride
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    dims = tl.arange(0, BLOCK_DV)
    place = out_ptr + (tokens.to(tl.int64) * (HKV * G) + heads)[:, None] * DV + dims
    written = valid[:, None] & (dims[None, :] < DV)
    if GATED:
        others = tl.load(place, mask=written, other=0.0)
    for page in tl.range(near, (last + P) // P, num_stages=1):
        slot = tl.load(slot_table + page)
        bits = tl.load(near_ptr + line * NEAR + page - near)
        # Asked for before the product that it is not needed for.
        v = load_tokens(v_ptr, slot, head, tl.minimum(last + 1 - page * P, P), v_stride_s,
                        v_stride_h, v_stride_p, P, BP, DV, BLOCK_DV)  # fmt: skip
        k = load_page(k_source, slot, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        causal = (keys[None, :] < P) & (page * P + keys[None, :] <= positions[:, None])
        hit = ((bits >> (rows // G)) & 1) != 0
        top, total, acc = _fold_page(q, k, v, hit, causal, scale, top, total, acc)
    out = normalised(total, acc)
    if GATED:
        out = out * gate[:, None] + others.to(tl.float32)
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=written)
    if WITH_LSE:
        index = tokens.to(tl.int64) * (HKV * G) + heads
        tl.store(lse_ptr + index, log_sum(top, total), mask=valid)
