"""Gradients of keys and values through selected attention: a page's accumulators stay, its readers
pass by.

Products are computed transposed, [keys, tokens x heads]: probabilities then enter the next product
from registers. Each program takes one chunk of a page's readers and writes an fp32 partial sum; the
window's pass adds the partial sums of a page in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..shapes import BranchStats, NSAShape, PagedKV
from .page_readers import PageReaders
from .paged_tiles import described, load_page, load_queries, page_operand, page_rows
from .tuning import Tile, page_gradient_tile

Tensor = torch.Tensor

# Readers of a chunk; the average page has n·P.
CHUNK = 1024


def key_backward(
    q: Tensor,
    kv: PagedKV,
    readers: PageReaders,
    d_out: Tensor,
    stats: BranchStats,
    *,
    nsa: NSAShape,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial sums [Hkv, chunks, P, Dk] of dk, but for the scale, and [Hkv, chunks, P, Dv] of dv.

    fp32; those beyond a head's last chunk are not written. Pages lie packed in ``kv``.
    """
    num_pages, num_kv_heads = kv.k.shape[:2]
    dk, dv = kv.k.shape[3], kv.v.shape[3]
    group = q.shape[1] // num_kv_heads
    tile = tile or page_gradient_tile(group, max(dk, dv))
    if descriptors is None:
        descriptors = described(kv)
    num_chunks = readers.chunk_pages.shape[1]
    shape = (num_kv_heads, num_chunks, nsa.page)
    dk_parts = torch.empty(*shape, dk, dtype=torch.float32, device=q.device)
    dv_parts = torch.empty(*shape, dv, dtype=torch.float32, device=q.device)
    _key_kernel[(num_chunks, num_kv_heads)](
        q,
        d_out,
        page_operand(kv.k, descriptors),
        page_operand(kv.v, descriptors),
        readers.tokens,
        readers.starts,
        readers.first_chunks,
        readers.chunk_pages,
        stats.lse,
        stats.delta,
        dk_parts,
        dv_parts,
        math.log2(math.e) / math.sqrt(dk),
        num_pages,
        num_chunks,
        readers.tokens.shape[1],
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
        CHUNK=readers.chunk,
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dk_parts, dv_parts


@triton.jit
def fold_readers(k, v, q, d_out, lse, delta, hidden, scale, dk, dv):
    """Add what a tile of queries [BM, D] gives to ``dk`` [BP, Dk], unscaled, and ``dv`` [BP, Dv].

    ``lse`` and ``delta`` [BM], +inf and 0 for rows that are none; ``hidden`` [BP, BM].
    """
    s = tl.dot(k, q.T, input_precision="ieee")  # [BP, BM]
    p = tl.where(hidden, 0.0, tl.exp2(s * scale - lse[None, :]))
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
    d_p = tl.dot(v, d_out.T, input_precision="ieee")
    d_s = p * (d_p - delta[None, :])
    return tl.dot(d_s.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def load_stats(lse_ptr, delta_ptr, tokens, heads, valid, NUM_HEADS: tl.constexpr):
    """LSE and delta [BM] of tokens and heads: +inf and 0, so no share, where not ``valid``."""
    index = tokens.to(tl.int64) * NUM_HEADS + heads
    lse = tl.load(lse_ptr + index, mask=valid, other=float("inf"))
    return lse, tl.load(delta_ptr + index, mask=valid, other=0.0)


@triton.jit
def part_of(parts_ptr, part, P: tl.constexpr, BP: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Pointers [BP, BLOCK_D] to a partial sum [P, D], and which of them are within it."""
    tokens = tl.arange(0, BP)
    dims = tl.arange(0, BLOCK_D)
    pointers = parts_ptr + part.to(tl.int64) * (P * D) + tokens[:, None] * D + dims[None, :]
    return pointers, (tokens[:, None] < P) & (dims[None, :] < D)


@triton.jit(do_not_specialize=["num_pages", "num_chunks"])
def _key_kernel(
    q_ptr,
    d_out_ptr,
    k_source,
    v_source,
    tokens_ptr,
    starts_ptr,
    first_chunks_ptr,
    chunk_pages_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    num_pages,
    num_chunks,
    num_listed,
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
    CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of the readers of one page and KV head; rows are token-major."""
    head = tl.program_id(1)
    part = head * num_chunks + tl.program_id(0)
    page = tl.load(chunk_pages_ptr + part)
    if page >= num_pages:
        return
    place = head * (num_pages + 1) + page
    first = tl.load(starts_ptr + place)
    start = first + (tl.program_id(0) - tl.load(first_chunks_ptr + place)) * CHUNK
    stop = tl.minimum(start + CHUNK, tl.load(starts_ptr + place + 1))
    listed = tokens_ptr + head.to(tl.int64) * num_listed
    rows = tl.arange(0, BM)
    heads = head * G + rows % G
    tile_end = rows < BT * G
    k = load_page(k_source, page, head, k_stride_s, k_stride_h, k_stride_p,
                  P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
    v = load_page(v_source, page, head, v_stride_s, v_stride_h, v_stride_p,
                  P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
    dk = tl.zeros([BP, BLOCK_DK], tl.float32)
    dv = tl.zeros([BP, BLOCK_DV], tl.float32)
    keys = page * P + tl.arange(0, BP)
    upcoming = tl.load(listed + start + rows // G, mask=start + rows // G < stop, other=0)
    for at in tl.range(start, stop, BT, num_stages=STAGES):
        # Read one turn ahead: addresses are known when their own turn comes.
        tokens = upcoming
        entries = at + rows // G
        upcoming = tl.load(listed + entries + BT, mask=entries + BT < stop, other=0)
        valid = tile_end & (entries < stop)
        q = load_queries(q_ptr, tokens, heads, valid, q_stride_t, q_stride_h, DK, BLOCK_DK)
        d_out = load_queries(d_out_ptr, tokens, heads, valid, d_stride_t, d_stride_h, DV, BLOCK_DV)
        lse, delta = load_stats(lse_ptr, delta_ptr, tokens, heads, valid, HKV * G)
        # Only the page's own tokens, first in its list, need it; a loop for them alone would cost
        # more than the mask does.
        hidden = keys[:, None] > tokens[None, :]
        dk, dv = fold_readers(k, v, q, d_out, lse, delta, hidden, scale, dk, dv)
    pointers, inside = part_of(dk_ptr, part, P, BP, DK, BLOCK_DK)
    tl.store(pointers, dk, mask=inside)
    pointers, inside = part_of(dv_ptr, part, P, BP, DV, BLOCK_DV)
    tl.store(pointers, dv, mask=inside)
