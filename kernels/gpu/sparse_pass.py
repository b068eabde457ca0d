"""Selected and window attention of a prefill step in one pass over pages, gates in its epilogue.

Neighbouring tokens share a tile and the union of their selected pages. Pages before every window
(far) are wholly visible: a row that did not select one is hidden by its exponent. Near pages feed
two softmax states, selection and window, from one product of queries and keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .online_softmax import fold_hits, fold_top, fold_values, normalised
from .page_union import SLOT_BITS, SLOT_MASK, TOKEN_MASK, first_near_page, unite_pages
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile, sparse_tile, window_tile

Tensor = torch.Tensor


def check_sparse(q: Tensor, kv: PagedKV, batch: StepBatch, nsa: NSAShape) -> None:
    """Raise ``ContractError`` unless ``q`` [T, Hq, Dk] fits the pages and the batch."""
    check(q.ndim == 3 and q.stride(2) == 1, "q must be [T, Hq, Dk] with unit last stride", q=q)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(q.shape[2] == kv.k.shape[3], "q and keys differ in Dk", q=q, k=kv.k)
    check(q.shape[1] % kv.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=kv.k)
    check(kv.k.shape[2] == nsa.page, "pages do not hold P tokens", k=kv.k, nsa=nsa)


def sparse_pass(
    q: Tensor,
    kv: PagedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    selection: Tensor | None = None,
    slots: Tensor | None = None,
    window: int = 0,
    gate_logits: Tensor | None = None,
    out_compressed: Tensor | None = None,
    tile: Tile | None = None,
    descriptors: bool | None = None,
    near_stages: int | None = None,
) -> Tensor:
    """Selected (``selection`` [T, Hkv, n]) and window (last ``window`` keys) attention [T, Hq, Dv].

    With ``gate_logits`` [T, Hq, 3] the gated sum of all branches; without, the one asked for.
    """
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = kv.v.shape[1], kv.v.shape[3]
    group = num_q_heads // num_kv_heads
    choose = window_tile if selection is None else sparse_tile
    tile = tile or choose(group, max(dk, dv))
    if descriptors is None:
        descriptors = _described(kv.k) and _described(kv.v)
    out = q.new_empty(num_tokens, num_q_heads, dv)
    union = None
    if selection is not None:
        union = unite_pages(
            selection, slots, batch, nsa=nsa, tile_tokens=tile.tokens, window=window
        )
    block_p = max(16, triton.next_power_of_2(nsa.page))
    block_dk, block_dv = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    gates = out if gate_logits is None else gate_logits
    _sparse_kernel[(num_tiles, num_kv_heads)](
        q,
        _pages(kv.k, block_p, block_dk, descriptors),
        _pages(kv.v, block_p, block_dv, descriptors),
        batch.slot_table if union is None else union.items,
        batch.slot_table if union is None else union.counts,
        batch.slot_table if union is None else union.near_bits,
        batch.slot_table,
        batch.positions,
        batch.cu_seqlens_q,
        out if out_compressed is None else out_compressed,
        gates,
        out,
        math.log2(math.e) / math.sqrt(dk),
        num_tokens,
        batch.num_rows,
        q.stride(0),
        q.stride(1),
        batch.slot_table.stride(0),
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *gates.stride(),
        HKV=num_kv_heads,
        G=group,
        DK=dk,
        DV=dv,
        BLOCK_DK=block_dk,
        BLOCK_DV=block_dv,
        P=nsa.page,
        BP=block_p,
        BT=tile.tokens,
        BM=tile.rows,
        ITEMS=1 if union is None else union.items.shape[2],
        NEAR=1 if union is None else union.near_bits.shape[2],
        WINDOW=window,
        SELECTED=selection is not None,
        GATED=gate_logits is not None,
        COMPRESSED=out_compressed is not None,
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        NEAR_STAGES=near_stages or max(2, tile.stages - 1),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _described(pool: Tensor) -> bool:
    """Whether the pool's pages can be fetched by tensor descriptors: 16-byte steps throughout."""
    steps = (pool.data_ptr(), *(x * pool.element_size() for x in pool.stride()[:3]))
    return all(step % 16 == 0 for step in steps)


def _pages(pool: Tensor, block_p: int, block_d: int, descriptors: bool) -> Any:
    """A pool [S, Hkv, P, D] as the kernel takes it."""
    if not descriptors:
        return pool
    return TensorDescriptor(pool, list(pool.shape), list(pool.stride()), [1, 1, block_p, block_d])


@triton.jit
def _load_page(source, slot, head, limit, stride_s, stride_h, stride_p, P: tl.constexpr,
               BP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
               DESCRIPTORS: tl.constexpr):  # fmt: skip
    """One head's page [BP, BLOCK_D]; unless WHOLE, zeros from token ``limit`` on."""
    tokens = tl.arange(0, BP)
    if DESCRIPTORS:
        x = source.load([slot, head, 0, 0]).reshape(BP, BLOCK_D)
        if not WHOLE:
            x = tl.where(tokens[:, None] < limit, x, 0.0)
        return x
    else:
        dims = tl.arange(0, BLOCK_D)
        start = source + slot.to(tl.int64) * stride_s + head * stride_h
        pointers = start + tokens[:, None] * stride_p + dims[None, :]
        if WHOLE and (P == BP) and (D == BLOCK_D):
            return tl.load(pointers)
        else:
            kept = (tokens < P) if WHOLE else (tokens < limit)
            return tl.load(pointers, mask=kept[:, None] & (dims[None, :] < D), other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def _sparse_kernel(
    q_ptr,
    k_source,
    v_source,
    items_ptr,
    counts_ptr,
    near_ptr,
    table_ptr,
    positions_ptr,
    cu_ptr,
    compressed_ptr,
    gates_ptr,
    out_ptr,
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
    WINDOW: tl.constexpr,
    SELECTED: tl.constexpr,
    GATED: tl.constexpr,
    COMPRESSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
    NEAR_STAGES: tl.constexpr,
):
    """BT tokens x G heads of one KV head; rows are token-major."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    rows = tl.arange(0, BM)
    members = rows // G
    tokens = token0 + members
    heads = head * G + rows % G
    valid = (members < BT) & (tokens < end)
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    first = tl.load(positions_ptr + token0).to(tl.int32)
    last = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32)
    dims_k = tl.arange(0, BLOCK_DK)
    q = tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims_k,
        mask=valid[:, None] & (dims_k[None, :] < DK),
        other=0.0,
    )  # [BM, BLOCK_DK]
    keys = tl.arange(0, BP)
    line = tile.to(tl.int64) * HKV + head
    slot_table = table_ptr + row.to(tl.int64) * table_stride
    near_first = first_near_page(first, P, WINDOW)
    border = tl.maximum(first, 0) // P
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    if SELECTED:
        count = tl.load(counts_ptr + line)
        items = items_ptr + line * ITEMS
        upcoming = tl.load(items, mask=count > 0, other=0)
        for i in tl.range(0, count, num_stages=STAGES):
            # Read one turn ahead: the page's address is known when its own turn comes.
            item = upcoming
            upcoming = tl.load(items + i + 1, mask=i + 1 < count, other=0)
            slot = (item & SLOT_MASK).to(tl.int32)
            bits = ((item >> SLOT_BITS) & TOKEN_MASK).to(tl.int32)
            k = _load_page(k_source, slot, head, P, k_stride_s, k_stride_h, k_stride_p,
                           P, BP, DK, BLOCK_DK, True, DESCRIPTORS)  # fmt: skip
            s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BP]
            if P != BP:
                s = tl.where(keys[None, :] < P, s, float("-inf"))
            hit = ((bits >> members) & 1) != 0
            p, alpha, top, total = fold_hits(s, hit, scale, top, total)
            v = _load_page(v_source, slot, head, P, v_stride_s, v_stride_h, v_stride_p,
                           P, BP, DV, BLOCK_DV, True, DESCRIPTORS)  # fmt: skip
            acc = fold_values(p, v, alpha, acc)
    if WINDOW > 0:
        w_top = tl.full([BM], -1.0e30, tl.float32)
        w_total = tl.zeros([BM], tl.float32)
        w_acc = tl.zeros([BM, BLOCK_DV], tl.float32)
        upcoming_slot = tl.load(slot_table + near_first, mask=near_first < border, other=0)
        upcoming_bits = 0
        if SELECTED:
            upcoming_bits = tl.load(near_ptr + line * NEAR)
        for page in tl.range(near_first, border, num_stages=NEAR_STAGES):
            slot = upcoming_slot
            bits = upcoming_bits
            upcoming_slot = tl.load(slot_table + page + 1, mask=page + 1 < border, other=0)
            if SELECTED:
                upcoming_bits = tl.load(near_ptr + line * NEAR + page + 1 - near_first)
            k = _load_page(k_source, slot, head, P, k_stride_s, k_stride_h, k_stride_p,
                           P, BP, DK, BLOCK_DK, True, DESCRIPTORS)  # fmt: skip
            s = tl.dot(q, k.T, input_precision="ieee")
            v = _load_page(v_source, slot, head, P, v_stride_s, v_stride_h, v_stride_p,
                           P, BP, DV, BLOCK_DV, True, DESCRIPTORS)  # fmt: skip
            if P != BP:
                s = tl.where(keys[None, :] < P, s, float("-inf"))
            # Nested, because the outer condition is known at compile time.
            if SELECTED:  # noqa: SIM102
                if bits != 0:
                    hit = ((bits >> members) & 1) != 0
                    p, alpha, top, total = fold_hits(s, hit, scale, top, total)
                    acc = fold_values(p, v, alpha, acc)
            inside = page * P + keys[None, :] > (positions - WINDOW)[:, None]
            p, alpha, w_top, w_total = fold_top(
                tl.where(inside, s, float("-inf")), scale, w_top, w_total
            )
            w_acc = fold_values(p, v, alpha, w_acc)
    for page in tl.range(border, (last + P) // P, num_stages=1):
        slot = tl.load(slot_table + page)
        limit = tl.minimum(last + 1 - page * P, P)
        k = _load_page(k_source, slot, head, P, k_stride_s, k_stride_h, k_stride_p,
                       P, BP, DK, BLOCK_DK, True, DESCRIPTORS)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")
        v = _load_page(v_source, slot, head, limit, v_stride_s, v_stride_h, v_stride_p,
                       P, BP, DV, BLOCK_DV, False, DESCRIPTORS)  # fmt: skip
        causal = (keys[None, :] < P) & (page * P + keys[None, :] <= positions[:, None])
        if SELECTED:
            bits = tl.load(near_ptr + line * NEAR + page - near_first)
            hit = ((bits >> members) & 1) != 0
            p, alpha, top, total = fold_hits(
                tl.where(causal, s, float("-inf")), hit, scale, top, total
            )
            acc = fold_values(p, v, alpha, acc)
        if WINDOW > 0:
            inside = causal & (page * P + keys[None, :] > (positions - WINDOW)[:, None])
            p, alpha, w_top, w_total = fold_top(
                tl.where(inside, s, float("-inf")), scale, w_top, w_total
            )
            w_acc = fold_values(p, v, alpha, w_acc)
    dims_v = tl.arange(0, BLOCK_DV)
    place = tokens.to(tl.int64) * (HKV * G) + heads
    written = valid[:, None] & (dims_v[None, :] < DV)
    out = normalised(total, acc) if SELECTED else normalised(w_total, w_acc)
    if GATED:
        gate = gates_ptr + tokens.to(tl.int64) * gate_stride_t + heads * gate_stride_h
        gate_s = tl.sigmoid(tl.load(gate + gate_stride_c, mask=valid, other=0.0).to(tl.float32))
        gate_w = tl.sigmoid(tl.load(gate + 2 * gate_stride_c, mask=valid, other=0.0).to(tl.float32))
        out = out * gate_s[:, None] + normalised(w_total, w_acc) * gate_w[:, None]
        if COMPRESSED:
            gate_c = tl.sigmoid(tl.load(gate, mask=valid, other=0.0).to(tl.float32))
            other = tl.load(compressed_ptr + place[:, None] * DV + dims_v, mask=written, other=0.0)
            out += other.to(tl.float32) * gate_c[:, None]
    tl.store(out_ptr + place[:, None] * DV + dims_v, out.to(out_ptr.dtype.element_ty), mask=written)
