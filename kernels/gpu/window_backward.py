"""Gradients of keys and values through window attention, added to those of selected attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..shapes import BranchStats, NSAShape, PagedKV, StepBatch
from .key_backward import fold_readers, load_stats, part_of
from .page_readers import PageReaders
from .paged_tiles import described, load_page, load_queries, page_operand, page_rows
from .tuning import Tile, page_gradient_tile

Tensor = torch.Tensor


def window_backward(
    q: Tensor,
    kv: PagedKV,
    d_out: Tensor,
    stats: BranchStats | None,
    parts: tuple[Tensor, Tensor] | None,
    readers: PageReaders | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile: Tile | None = None,
    descriptors: bool | None = None,
    boxes: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """dk [T, Hkv, Dk] and dv [T, Hkv, Dv]: the window's share, if ``stats`` are given, plus parts.

    ``parts`` are the partial sums of ``key_backward`` for ``readers``. ``boxes`` says whether tiles
    of queries come through descriptors, too.
    """
    num_pages, num_kv_heads = kv.k.shape[:2]
    dk, dv = kv.k.shape[3], kv.v.shape[3]
    group = q.shape[1] // num_kv_heads
    tile = tile or page_gradient_tile(group, max(dk, dv))
    if descriptors is None:
        descriptors = described(kv)
    if boxes is None:
        boxes = _are_boxes(q, tile, group) and _are_boxes(d_out, tile, group)
    d_keys = kv.k.new_empty(q.shape[0], num_kv_heads, dk)
    d_values = kv.v.new_empty(q.shape[0], num_kv_heads, dv)
    dk_parts, dv_parts = parts or (q, q)
    _window_kernel[(num_pages, num_kv_heads)](
        _tile_operand(q, tile, group, boxes),
        _tile_operand(d_out, tile, group, boxes),
        page_operand(kv.k, descriptors),
        page_operand(kv.v, descriptors),
        batch.token_rows,
        batch.cu_seqlens_q,
        q if stats is None else stats.lse,
        q if stats is None else stats.delta,
        dk_parts,
        dv_parts,
        q if readers is None else readers.first_chunks,
        d_keys,
        d_values,
        math.log2(math.e) / math.sqrt(dk),
        1 / math.sqrt(dk),
        num_pages,
        dk_parts.shape[1],
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
        WINDOWED=stats is not None,
        WITH_PARTS=parts is not None,
        DESCRIPTORS=descriptors,
        BOXES=boxes,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return d_keys, d_values


def _are_boxes(x: Tensor, tile: Tile, group: int) -> bool:
    """Whether neighbours' heads in ``x`` [T, Hq, D] fill a tile, in 16-byte steps."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:2]))
    filled = tile.tokens * group == tile.rows and x.shape[2].bit_count() == 1
    return filled and all(step % 16 == 0 for step in steps)


def _tile_operand(x: Tensor, tile: Tile, group: int, boxes: bool) -> Any:
    """``x`` [T, Hq, D] as the kernel takes it: a descriptor of tiles of one KV head, or itself."""
    if not boxes:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.tokens, group, x.shape[2]])


@triton.jit
def _load_rows(source, at, tokens, heads, valid, stride_t, stride_h, G: tl.constexpr,
               BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BOXES: tl.constexpr):  # fmt: skip
    """Rows [BM, BLOCK_D] of neighbouring tokens; those that are not ``valid`` hold anything."""
    if BOXES:
        return source.load([at, tl.program_id(1) * G, 0]).reshape(BM, BLOCK_D)
    else:
        return load_queries(source, tokens, heads, valid, stride_t, stride_h, D, BLOCK_D)


@triton.jit
def _store_page(out_ptr, acc, page, head, HKV: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
                D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """A page's rows of [T, Hkv, D]."""
    keys = tl.arange(0, BP)
    dims = tl.arange(0, BLOCK_D)
    lines = (page.to(tl.int64) * P + keys) * HKV + head
    inside = (keys[:, None] < P) & (dims[None, :] < D)
    tl.store(out_ptr + lines[:, None] * D + dims, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_pages", "num_chunks"])
def _window_kernel(
    q_source,
    d_out_source,
    k_source,
    v_source,
    token_rows_ptr,
    cu_ptr,
    lse_ptr,
    delta_ptr,
    dk_parts_ptr,
    dv_parts_ptr,
    first_chunks_ptr,
    dk_ptr,
    dv_ptr,
    scale_log2,
    scale,
    num_pages,
    num_chunks,
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
    WINDOWED: tl.constexpr,
    WITH_PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BOXES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One page and KV head against the tokens whose windows reach it; rows are token-major."""
    page = tl.program_id(0)
    head = tl.program_id(1)
    dk = tl.zeros([BP, BLOCK_DK], tl.float32)
    dv = tl.zeros([BP, BLOCK_DV], tl.float32)
    if WITH_PARTS:
        place = first_chunks_ptr + head * (num_pages + 1) + page
        for chunk in range(tl.load(place), tl.load(place + 1)):
            part = head * num_chunks + chunk
            pointers, inside = part_of(dk_parts_ptr, part, P, BP, DK, BLOCK_DK)
            dk += tl.load(pointers, mask=inside, other=0.0)
            pointers, inside = part_of(dv_parts_ptr, part, P, BP, DV, BLOCK_DV)
            dv += tl.load(pointers, mask=inside, other=0.0)
    if WINDOWED:
        rows = tl.arange(0, BM)
        heads = head * G + rows % G
        keys = page * P + tl.arange(0, BP)
        row = tl.load(token_rows_ptr + page * P)
        stop = tl.minimum(tl.load(cu_ptr + row + 1), page * P + P - 1 + WINDOW)
        k = load_page(k_source, page, head, k_stride_s, k_stride_h, k_stride_p,
                      P, BP, DK, BLOCK_DK, DESCRIPTORS)  # fmt: skip
        v = load_page(v_source, page, head, v_stride_s, v_stride_h, v_stride_p,
                      P, BP, DV, BLOCK_DV, DESCRIPTORS)  # fmt: skip
        for at in tl.range(page * P, stop, BT, num_stages=STAGES):
            tokens = at + rows // G
            valid = (rows < BT * G) & (tokens < stop)
            q = _load_rows(q_source, at, tokens, heads, valid, q_stride_t, q_stride_h,
                           G, BM, DK, BLOCK_DK, BOXES)  # fmt: skip
            d_out = _load_rows(d_out_source, at, tokens, heads, valid, d_stride_t, d_stride_h,
                               G, BM, DV, BLOCK_DV, BOXES)  # fmt: skip
            lse, delta = load_stats(lse_ptr, delta_ptr, tokens, heads, valid, HKV * G)
            ahead = tokens[None, :] - keys[:, None]
            hidden = (ahead < 0) | (ahead >= WINDOW)
            dk, dv = fold_readers(k, v, q, d_out, lse, delta, hidden, scale_log2, dk, dv)
    _store_page(dk_ptr, dk * scale, page, head, HKV, P, BP, DK, BLOCK_DK)
    _store_page(dv_ptr, dv, page, head, HKV, P, BP, DV, BLOCK_DV)
