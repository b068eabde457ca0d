"""Attention over compressed entries (arXiv 2502.11089, equation 7) and the selection it yields."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import CompressedKV, NSAShape, StepBatch, check_ranked
from .decode_compressed import decode_compressed_attention
from .entry_gather import Entries, gather_entries, load_entries
from .online_softmax import fold_top, fold_values, normalised
from .query_tiles import locate_tile, num_query_tiles, num_visible
from .score_pass import select_from_entries
from .tuning import Tile, attend_tile

Tensor = torch.Tensor

# Tiles of entries hold whole pages.
MAX_PAGE_ENTRIES = 64


def compressed_attention(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool = True,
    ranked: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Output [T, Hq, Dv] of the compressed branch and the selected blocks [T, Hkv, n] int32.

    ``q`` [T, Hq, Dk]. The selection is ascending and padded with -1. A token that sees no entry
    gets 0; padding gets 0 and -1. ``with_output=False`` gives None for the output. In a short step
    ``ranked`` [T, Hkv, m] int32, m >= n, is filled in the selection's form with the m best blocks.
    Raises ``ContractError`` where shapes do not fit.
    """
    _check(q, compressed, batch, nsa)
    if ranked is not None:
        check_ranked(ranked, compressed.k.shape[1], batch, nsa)
    if batch.is_short:
        return decode_compressed_attention(
            q, compressed, batch, nsa=nsa, with_output=with_output, ranked=ranked
        )
    return prefill_compressed_attention(q, compressed, batch, nsa=nsa, with_output=with_output)


def prefill_compressed_attention(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """As ``compressed_attention``, for steps with long rows (any mix of lengths is right)."""
    entries = gather_entries(compressed, batch, nsa=nsa)
    sparse = batch.max_context_len > nsa.dense_len
    out, lse = None, None
    if with_output or sparse:
        out, lse = attend_entries(q, entries, batch, nsa=nsa, with_output=with_output)
    return out, select_from_entries(q, entries, lse, batch, nsa=nsa)


def attend_entries(
    q: Tensor,
    entries: Entries,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Output [T, Hq, Dv] over visible entries, and log2 of the sum of exponentials [T, Hq] fp32."""
    num_tokens, num_q_heads, dk = q.shape
    num_kv_heads, dv = _kv_heads(entries, batch), entries.v.shape[-1]
    group = num_q_heads // num_kv_heads
    tile = tile or attend_tile(group, max(dk, dv))
    out = q.new_empty(num_tokens, num_q_heads, dv) if with_output else None
    lse = q.new_empty(num_tokens, num_q_heads, dtype=torch.float32)
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    block_dk, block_dv = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    _attend_kernel[(num_tiles * num_kv_heads,)](
        q,
        entries.operand(entries.k, tile.keys, block_dk),
        entries.operand(entries.v, tile.keys, block_dv),
        batch.block_table,
        batch.positions,
        batch.cu_seqlens_q,
        out if with_output else lse,
        lse,
        math.log2(math.e) / math.sqrt(dk),
        num_tokens,
        batch.num_rows,
        num_tiles,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        *entries.k.stride()[:3],
        *entries.v.stride()[:3],
        HKV=num_kv_heads,
        G=group,
        DK=dk,
        DV=dv,
        BLOCK_DK=block_dk,
        BLOCK_DV=block_dv,
        BT=tile.tokens,
        BM=tile.rows,
        BN=tile.keys,
        L=nsa.compress_len,
        STRIDE=nsa.compress_stride,
        E=nsa.entries_per_page,
        PAGED=entries.paged,
        WITH_OUTPUT=with_output,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


def _kv_heads(entries: Entries, batch: StepBatch) -> int:
    return entries.k.shape[1] if entries.paged else entries.k.shape[0] // batch.num_rows


def _check(q: Tensor, compressed: CompressedKV, batch: StepBatch, nsa: NSAShape) -> None:
    entries = nsa.entries_per_page
    check(
        entries <= MAX_PAGE_ENTRIES and entries.bit_count() == 1,
        "Triton kernels need a power of two, at most 64, of compressed entries per page (P/d)",
        nsa=nsa,
    )
    check(q.ndim == 3 and q.stride(2) == 1, "q must be [T, Hq, Dk] with unit last stride", q=q)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(q.shape[2] == compressed.k.shape[3], "q and keys differ in Dk", q=q, k=compressed.k)
    check(q.shape[1] % compressed.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=compressed.k)
    check(
        compressed.k.shape[2] == entries,
        "compressed pages do not hold P/d entries",
        k=compressed.k,
        nsa=nsa,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles", "table_stride"])
def _attend_kernel(
    q_ptr,
    k_source,
    v_source,
    table_ptr,
    positions_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    scale,
    num_tokens,
    num_rows,
    num_tiles,
    q_stride_t,
    q_stride_h,
    table_stride,
    k_stride_b,
    k_stride_h,
    k_stride_e,
    v_stride_b,
    v_stride_h,
    v_stride_e,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    PAGED: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BT tokens x G heads against all entries they see; rows are token-major."""
    OV: tl.constexpr = L // STRIDE
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
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    dims_k = tl.arange(0, BLOCK_DK)
    q = tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims_k,
        mask=valid[:, None] & (dims_k[None, :] < DK),
        other=0.0,
    )  # [BM, BLOCK_DK]
    visible = num_visible(positions, L, STRIDE)  # [BM]
    last = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32)
    most = num_visible(last, L, STRIDE)
    # Tiles of entries that even the first token sees whole need no mask.
    full = num_visible(tl.load(positions_ptr + token0).to(tl.int32), L, STRIDE) // BN * BN
    row_table = table_ptr + row.to(tl.int64) * table_stride
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for first in tl.range(0, full, BN, num_stages=STAGES):
        k = load_entries(k_source, row_table, row, head, first, full, k_stride_b, k_stride_h,
                         k_stride_e, HKV, BN, DK, BLOCK_DK, E, OV, PAGED)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")
        p, alpha, top, total = fold_top(s, scale, top, total)
        if WITH_OUTPUT:
            v = load_entries(v_source, row_table, row, head, first, full, v_stride_b, v_stride_h,
                             v_stride_e, HKV, BN, DV, BLOCK_DV, E, OV, PAGED)  # fmt: skip
            acc = fold_values(p, v, alpha, acc)
    for first in tl.range(full, most, BN, num_stages=1):
        k = load_entries(k_source, row_table, row, head, first, most, k_stride_b, k_stride_h,
                         k_stride_e, HKV, BN, DK, BLOCK_DK, E, OV, PAGED)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")
        s = tl.where(first + tl.arange(0, BN)[None, :] < visible[:, None], s, float("-inf"))
        p, alpha, top, total = fold_top(s, scale, top, total)
        if WITH_OUTPUT:
            v = load_entries(v_source, row_table, row, head, first, most, v_stride_b, v_stride_h,
                             v_stride_e, HKV, BN, DV, BLOCK_DV, E, OV, PAGED)  # fmt: skip
            acc = fold_values(p, v, alpha, acc)
    seen = total > 0.0
    index = tokens.to(tl.int64) * (HKV * G) + heads
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)
    tl.store(lse_ptr + index, lse, mask=valid)
    if WITH_OUTPUT:
        dims_v = tl.arange(0, BLOCK_DV)
        tl.store(
            out_ptr + index[:, None] * DV + dims_v,
            normalised(total, acc).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (dims_v[None, :] < DV),
        )
