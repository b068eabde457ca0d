"""Gradient of the queries of the compressed branch: query tiles against the entries they see.

Token t sees slots of its sequence from l/d - 1 up to (t + 1)/d - 1, counted in slots of the packed
batch: slot s ends with token (s + 1)·d - 1, and sequences start at page borders.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..shapes import NSAShape, StepBatch
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile

Tensor = torch.Tensor


def query_gradient(
    q: Tensor,
    k_entries: Tensor,
    v_entries: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    sums: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile,
) -> Tensor:
    """dQ [T, Hq, Dk]. Fills ``sums`` with LSE and delta, the sum over Dv of output times ``d_out``.

    ``q`` with strides that ``entry_gradients`` takes too; all else contiguous.
    """
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = v_entries.shape[1:]
    group = num_q_heads // num_kv_heads
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    block_dk, block_dv = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    _query_gradient_kernel[(num_tiles * num_kv_heads,)](
        q,
        entries_operand(k_entries, tile.keys, block_dk),
        entries_operand(v_entries, tile.keys, block_dv),
        out,
        d_out,
        lse,
        sums[0],
        sums[1],
        dq,
        batch.cu_seqlens_q,
        math.log2(math.e) / math.sqrt(dk),
        1.0 / math.sqrt(dk),
        num_tokens,
        batch.num_rows,
        num_tiles,
        q.stride(0),
        q.stride(1),
        HKV=num_kv_heads,
        G=group,
        PADDED_G=sums.shape[3],
        DK=dk,
        DV=dv,
        BLOCK_DK=block_dk,
        BLOCK_DV=block_dv,
        BT=tile.tokens,
        BM=tile.rows,
        BN=tile.keys,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq


def entries_operand(entries: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Entries [slots, Hkv, D], as boxes of one head's run of slots."""
    slots, heads, dim = entries.shape
    return TensorDescriptor(entries, [heads, slots, dim], [dim, heads * dim, 1], [1, rows, width])


@triton.jit
def _fold_query_gradient(s, do, k, v, lse, delta, scale, dq):
    """``dq`` with the share of one tile of entries, whose raw scores are ``s`` [BM, BN]."""
    dp = tl.dot(do, v.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles"])
def _query_gradient_kernel(
    q_ptr,
    k_source,
    v_source,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    kept_lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_ptr,
    scale,
    factor,
    num_tokens,
    num_rows,
    num_tiles,
    q_stride_t,
    q_stride_h,
    HKV: tl.constexpr,
    G: tl.constexpr,
    PADDED_G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BT tokens x G heads against all entries they see; rows are token-major."""
    # The last tiles see the most entries: they start first, so that none runs alone at the end.
    tile = num_tiles - 1 - tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    row, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    rows = tl.arange(0, BM)
    tokens = token0 + rows // G
    heads = head * G + rows % G
    valid = (rows < BT * G) & (tokens < end)
    dims_k = tl.arange(0, BLOCK_DK)
    dims_v = tl.arange(0, BLOCK_DV)
    index = tokens.to(tl.int64) * (HKV * G) + heads
    inside_k = valid[:, None] & (dims_k[None, :] < DK)
    inside_v = valid[:, None] & (dims_v[None, :] < DV)
    places_v = index[:, None] * DV + dims_v[None, :]
    do = tl.load(d_out_ptr + places_v, mask=inside_v, other=0.0)  # [BM, BLOCK_DV]
    o = tl.load(out_ptr + places_v, mask=inside_v, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
    q = tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims_k,
        mask=inside_k,
        other=0.0,
    )  # [BM, BLOCK_DK]
    lse = tl.load(lse_ptr + index, mask=valid, other=float("inf"))
    kept = (head.to(tl.int64) * num_tokens + tokens) * PADDED_G + rows % G
    tl.store(kept_lse_ptr + kept, lse, mask=valid)
    tl.store(delta_ptr + kept, delta, mask=valid)
    low = tl.load(cu_ptr + row) // STRIDE + (L // STRIDE - 1)
    seen = (tokens + 1) // STRIDE  # [BM], slots from here on are hidden
    most = tl.minimum(token0 + BT, end) // STRIDE
    # Tiles of entries that even the first token sees whole need no mask.
    full = low + tl.maximum((token0 + 1) // STRIDE - low, 0) // BN * BN
    dq = tl.zeros([BM, BLOCK_DK], tl.float32)
    for first in tl.range(low, full, BN, num_stages=STAGES):
        k = k_source.load([head, first, 0]).reshape(BN, BLOCK_DK)
        v = v_source.load([head, first, 0]).reshape(BN, BLOCK_DV)
        s = tl.dot(q, k.T, input_precision="ieee")
        dq = _fold_query_gradient(s, do, k, v, lse, delta, scale, dq)
    for first in tl.range(full, most, BN, num_stages=1):
        k = k_source.load([head, first, 0]).reshape(BN, BLOCK_DK)
        v = v_source.load([head, first, 0]).reshape(BN, BLOCK_DV)
        s = tl.dot(q, k.T, input_precision="ieee")
        s = tl.where((first + tl.arange(0, BN))[None, :] < seen[:, None], s, float("-inf"))
        dq = _fold_query_gradient(s, do, k, v, lse, delta, scale, dq)
    dq = (dq * factor).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + index[:, None] * DK + dims_k, dq, mask=inside_k)
