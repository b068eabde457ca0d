"""Compressed entries of a φ that is a matrix product: gather the tokens, multiply, scatter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch
from .compress import compress

Tensor = torch.Tensor


@triton.jit
def token_vectors(
    x_ptr,  # [T, Hkv, D], this step's
    cache_ptr,  # [S, Hkv, P, D]
    table,  # slot table of the row
    token,
    position,
    chunk_first,
    head,
    dims,
    stride_xt,
    stride_xh,
    stride_cn,
    stride_ch,
    stride_cp,
    D: tl.constexpr,
    LEN: tl.constexpr,
    LEN_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The last LEN tokens up to ``position``, as cached: [LEN_PAD, dims] fp32, zeros beyond LEN."""
    offset = tl.arange(0, LEN_PAD)
    at = position - (LEN - 1) + offset
    inside = (dims < D)[None, :]
    fresh = (offset < LEN) & (at >= chunk_first)
    source = (token - (LEN - 1) + offset).to(tl.int64) * stride_xt + head * stride_xh
    new = tl.load(x_ptr + source[:, None] + dims[None, :], mask=fresh[:, None] & inside, other=0.0)
    older = (offset < LEN) & (at < chunk_first)
    slot = tl.load(table + at // PAGE, mask=older, other=0).to(tl.int64)
    source = slot * stride_cn + head * stride_ch + (at % PAGE) * stride_cp
    old = tl.load(
        cache_ptr + source[:, None] + dims[None, :], mask=older[:, None] & inside, other=0.0
    )
    return new.to(cache_ptr.dtype.element_ty).to(tl.float32) + old.to(tl.float32)


@triton.jit
def _gather(
    k_ptr,
    v_ptr,
    cache_k_ptr,
    cache_v_ptr,
    out_k_ptr,  # [E, Hkv, l, Dk] fp32
    out_v_ptr,
    tokens_ptr,  # [E], -1 for none
    positions_ptr,
    token_rows_ptr,
    cu_seqlens_ptr,
    slot_table_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ckn,
    stride_ckh,
    stride_ckp,
    stride_cvn,
    stride_cvh,
    stride_cvp,
    stride_slots,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    LEN: tl.constexpr,
    LEN_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    head = tl.program_id(0)
    entry = tl.program_id(1)
    token = tl.load(tokens_ptr + entry)
    if token >= 0:
        at = tl.load(positions_ptr + token).to(tl.int32)
        row = tl.load(token_rows_ptr + token)
        chunk_first = at - (token - tl.load(cu_seqlens_ptr + row))
        table = slot_table_ptr + row.to(tl.int64) * stride_slots
        offset = tl.arange(0, LEN_PAD)
        to = ((entry.to(tl.int64) * HKV + head) * LEN + offset)[:, None]
        dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
        x = token_vectors(
            k_ptr, cache_k_ptr, table, token, at, chunk_first, head, dk,
            stride_kt, stride_kh, stride_ckn, stride_ckh, stride_ckp, DK, LEN, LEN_PAD, PAGE,
        )  # fmt: skip
        inside = (offset < LEN)[:, None]
        tl.store(out_k_ptr + to * DK + dk[None, :], x, mask=inside & (dk < DK)[None, :])
        x = token_vectors(
            v_ptr, cache_v_ptr, table, token, at, chunk_first, head, dv,
            stride_vt, stride_vh, stride_cvn, stride_cvh, stride_cvp, DV, LEN, LEN_PAD, PAGE,
        )  # fmt: skip
        tl.store(out_v_ptr + to * DV + dv[None, :], x, mask=inside & (dv < DV)[None, :])


@triton.jit
def _scatter(
    x_k_ptr,  # [E, Hkv, Dk] fp32
    x_v_ptr,
    entry_k_ptr,
    entry_v_ptr,
    tokens_ptr,
    positions_ptr,
    token_rows_ptr,
    block_table_ptr,
    stride_ekn,
    stride_ekh,
    stride_eke,
    stride_evn,
    stride_evh,
    stride_eve,
    stride_blocks,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
):
    head = tl.program_id(0)
    entry = tl.program_id(1)
    token = tl.load(tokens_ptr + entry)
    if token >= 0:
        at = tl.load(positions_ptr + token).to(tl.int32)
        row = tl.load(token_rows_ptr + token).to(tl.int64)
        block = tl.load(block_table_ptr + row * stride_blocks + at // PAGE).to(tl.int64)
        place = at % PAGE // STRIDE
        source = entry.to(tl.int64) * HKV + head
        dims = tl.arange(0, DK_PAD)
        x = tl.load(x_k_ptr + source * DK + dims, mask=dims < DK)
        to = entry_k_ptr + block * stride_ekn + head * stride_ekh + place * stride_eke + dims
        tl.store(to, x.to(entry_k_ptr.dtype.element_ty), mask=dims < DK)
        dims = tl.arange(0, DV_PAD)
        x = tl.load(x_v_ptr + source * DV + dims, mask=dims < DV)
        to = entry_v_ptr + block * stride_evn + head * stride_evh + place * stride_eve + dims
        tl.store(to, x.to(entry_v_ptr.dtype.element_ty), mask=dims < DV)


def head_sizes(kv: PagedKV, nsa: NSAShape) -> dict[str, int]:
    """Compile-time sizes of heads and pages."""
    dk, dv = kv.k.shape[3], kv.v.shape[3]
    return {
        "DK": dk,
        "DV": dv,
        "DK_PAD": triton.next_power_of_2(dk),
        "DV_PAD": triton.next_power_of_2(dv),
        "PAGE": nsa.page,
    }


def _completing_tokens(batch: StepBatch, nsa: NSAShape) -> Tensor:
    """[E] int32: the tokens that complete an entry, in order, then −1; E is a host-side bound."""
    most = min(batch.num_tokens, batch.num_tokens // nsa.compress_stride + batch.num_rows)
    first = batch.positions + 1 - nsa.compress_len
    completes = (first >= 0) & (first % nsa.compress_stride == 0)
    places = torch.where(completes, completes.cumsum(0) - 1, most)
    tokens = torch.full((most + 1,), -1, dtype=torch.int32, device=first.device)
    every = torch.arange(batch.num_tokens, dtype=torch.int32, device=first.device)
    return tokens.scatter_(0, places, torch.where(completes, every, -1))[:most]


def write_products(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    compressed: CompressedKV,
    batch: StepBatch,
    nsa: NSAShape,
    compressor: Compressor,
) -> None:
    """Write every entry that a token of this step completes."""
    tokens = _completing_tokens(batch, nsa)
    hkv, entries = k.shape[1], tokens.shape[0]
    sizes = head_sizes(kv, nsa)

    def gathered(x: Tensor) -> Tensor:
        shape = (entries, hkv, nsa.compress_len, x.shape[2])
        return torch.zeros(shape, dtype=torch.float32, device=x.device)

    x_k, x_v = gathered(k), gathered(v)
    _gather[hkv, entries](
        k, v, kv.k, kv.v, x_k, x_v, tokens, batch.positions, batch.token_rows, batch.cu_seqlens_q,
        batch.slot_table, *k.stride()[:2], *v.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3],
        batch.slot_table.stride(0), HKV=hkv, LEN=nsa.compress_len,
        LEN_PAD=triton.next_power_of_2(nsa.compress_len), **sizes,
    )  # fmt: skip
    last = batch.positions[tokens.clamp(min=0).long()]
    y_k, y_v = compress(
        x_k, x_v, first_positions=last + 1 - nsa.compress_len, compressor=compressor
    )
    _scatter[hkv, entries](
        y_k.contiguous(), y_v.contiguous(), compressed.k, compressed.v, tokens, batch.positions,
        batch.token_rows, batch.block_table, *compressed.k.stride()[:3],
        *compressed.v.stride()[:3], batch.block_table.stride(0), HKV=hkv,
        STRIDE=nsa.compress_stride, **sizes,
    )  # fmt: skip
