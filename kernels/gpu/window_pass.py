"""Sliding-window attention of a prefill step: neighbours share their pages, so wide tiles."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..shapes import NSAShape, PagedKV, StepBatch
from .online_softmax import fold_top, fold_values, log_sum, normalised
from .paged_tiles import (
    described,
    load_gates,
    load_page,
    load_queries,
    load_tokens,
    page_operand,
    page_rows,
)
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile, window_tile

Tensor = torch.Tensor


def window_pass(
    q: Tensor,
    kv: PagedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    gate_logits: Tensor | None = None,
    out_compressed: Tensor | None = None,
    lse: Tensor | None = None,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Attention [T, Hq, Dv] over each token's last ``nsa.window`` keys.

    With ``gate_logits`` [T, Hq, 3] times its gate, plus ``out_compressed`` [T, Hq, Dv], if given,
    times the gate of that branch. ``lse`` [T, Hq] fp32, if given, gets log2 of the sums of
    exponentials.
    """
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = kv.v.shape[1], kv.v.shape[3]
    group = num_q_heads // num_kv_heads
    tile = tile or window_tile(group, max(dk, dv))
    if descriptors is None:
        descriptors = described(kv)
    out = q.new_empty(num_tokens, num_q_heads, dv)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    gates = out if gate_logits is None else gate_logits
    _window_kernel[(num_tiles, num_kv_heads)](
        q,
        page_operand(kv.k, descriptors),
        page_operand(kv.v, descriptors),
        kv.v,
        batch.slot_table,
        batch.positions,
        batch.cu_seqlens_q,
        out if out_compressed is None else out_compressed,
        gates,
        out,
        out if lse is None else lse,
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
        BLOCK_DK=triton.next_power_of_2(dk),
        BLOCK_DV=triton.next_power_of_2(dv),
        P=nsa.page,
        BP=page_rows(nsa.page),
        BT=tile.tokens,
        BM=tile.rows,
        WINDOW=nsa.window,
        GATED=gate_logits is not None,
        COMPRESSED=gate_logits is not None and out_compressed is not None,
        WITH_LSE=lse is not None,
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def _window_kernel(
    q_ptr,
    k_source,
    v_source,
    v_ptr,
    table_ptr,
    positions_ptr,
    cu_ptr,
    compressed_ptr,
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
    WINDOW: tl.constexpr,
    GATED: tl.constexpr,
    COMPRESSED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BT tokens x G heads of one KV head; rows are token-major."""
    head = tl.program_id(1)
    row, token0, end = locate_tile(cu_ptr, tl.program_id(0), num_rows, num_tokens, BT)
    if token0 >= end:
        return
    rows = tl.arange(0, BM)
    tokens = token0 + rows // G
    heads = head * G + rows % G
    valid = (rows < BT * G) & (tokens < end)
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    first = tl.load(positions_ptr + token0).to(tl.int32)
    last = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32)
    keys = tl.arange(0, BP)
    slot_table = table_ptr + row.to(tl.int64) * table_stride
    page0 = tl.maximum(first - (WINDOW - 1), 0) // P
    # Pages from ``border`` on hold keys after the first token, and perhaps unwritten ones.
    border = tl.maximum(first, 0) // P
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    upcoming = tl.load(slot_table + page0, mask=page0 < border, other=0)
    q = load_queries(q_ptr, tokens, heads, valid, q_stride_t, q_stride_h, DK, BLOCK_DK)
    if GATED:
        gate = load_gates(
            gates_ptr, tokens, heads, 2, valid, gate_stride_t, gate_stride_h, gate_stride_c
        )
        other_gate = load_gates(
            gates_ptr, tokens, heads, 0, valid, gate_stride_t, gate_stride_h, gate_stride_c
        )
    for page in tl.range(page0, border, num_stages=STAGES):
        # Read one turn ahead: the page's address is known when its own turn comes.
        slot = upcoming
        upcoming = tl.load(slot_table + page + 1, mask=page + 1 < border, other=0)
        k = load_page(k_source, slot, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BP]
        # Only the first pages need it, but with a branch products would no longer overlap.
        inside = page * P + keys[None, :] > (positions - WINDOW)[:, None]
        s = tl.where(inside & (keys[None, :] < P), s, float("-inf"))
        p, alpha, top, total = fold_top(s, scale, top, total)
        v = load_page(v_source, slot, head, v_stride_s, v_stride_h, v_stride_p,
                      P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
        acc = fold_values(p, v, alpha, acc)
    dims_v = tl.arange(0, BLOCK_DV)
    place = (tokens.to(tl.int64) * (HKV * G) + heads)[:, None] * DV + dims_v
    written = valid[:, None] & (dims_v[None, :] < DV)
    if COMPRESSED:
        other = tl.load(compressed_ptr + place, mask=written, other=0.0)
    for page in tl.range(border, (last + P) // P, num_stages=1):
        slot = tl.load(slot_table + page)
        # Asked for before the product that it is not needed for.
        v = load_tokens(v_ptr, slot, head, tl.minimum(last + 1 - page * P, P), v_stride_s,
                        v_stride_h, v_stride_p, P, BP, DV, BLOCK_DV)  # fmt: skip
        k = load_page(k_source, slot, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")
        at = page * P + keys[None, :]
        inside = (at <= positions[:, None]) & (at > (positions - WINDOW)[:, None])
        s = tl.where(inside & (keys[None, :] < P), s, float("-inf"))
        p, alpha, top, total = fold_top(s, scale, top, total)
        acc = fold_values(p, v, alpha, acc)
    out = normalised(total, acc)
    if GATED:
        out = out * gate[:, None]
    if COMPRESSED:
        out += other.to(tl.float32) * other_gate[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=written)
    if WITH_LSE:
        line = tokens.to(tl.int64) * (HKV * G) + heads
        tl.store(lse_ptr + line, log_sum(top, total), mask=valid)
