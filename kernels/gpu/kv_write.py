"""Writing a step's keys, values and completed compressed entries in one launch.

A program writes some tokens of one KV head and the entries that they complete. It takes this step's
tokens from the inputs, rounded to the cache's type, and older ones from the cache: programs don't
wait for each other, and an entry's bytes don't depend on how the prompt was chunked. φ of the kinds
``linear`` and ``mlp`` are matrix products over gathered tokens, between two small launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import CompressedKV, CompressKind, Compressor, NSAShape, PagedKV, Phi, StepBatch
from .entry_products import head_sizes, token_vectors, write_products

Tensor = torch.Tensor

_PREFILL_TOKENS = 16  # of one program; a decode step's rows are spread one token a program
_IN_KERNEL = (CompressKind.MEAN, CompressKind.WEIGHTED)


@triton.jit
def _reduce(
    x,  # [LEN_PAD, dims] fp32
    position_ptr,  # [Hkv, l, D], where there is one
    weight_ptr,  # [Hkv, l], where weighted
    head,
    dims,
    D: tl.constexpr,
    LEN: tl.constexpr,
    LEN_PAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITION: tl.constexpr,
):
    offset = tl.arange(0, LEN_PAD)
    inside = (offset < LEN)[:, None] & (dims < D)[None, :]
    if POSITION:
        at = (head * LEN + offset)[:, None] * D + dims[None, :]
        x += tl.load(position_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + head * LEN + offset, mask=offset < LEN, other=0.0)
        return tl.sum(x * weight.to(tl.float32)[:, None], 0)
    return tl.sum(x, 0) / LEN


@triton.jit
def _turn(inv_freq_ptr, positions, dims, ROTARY: tl.constexpr):
    """cos and signed sin [positions, dims] such that x·cos + partner·sin rotates forward."""
    HALF: tl.constexpr = ROTARY // 2
    rotated = dims < ROTARY
    freq = tl.load(inv_freq_ptr + dims % HALF, mask=rotated, other=0.0).to(tl.float32)
    angle = positions.to(tl.float32)[:, None] * freq[None, :]
    sin = tl.sin(angle)
    return tl.cos(angle), tl.where((dims < HALF)[None, :], -sin, sin)


@triton.jit
def _write_part(
    x_ptr,
    cache_ptr,
    entry_ptr,  # [N, Hkv, P/d, D]
    phi_position_ptr,
    phi_weight_ptr,
    inv_freq_ptr,
    rope_scale,
    table,
    block,
    token,
    position,
    chunk_first,
    head,
    stride_xt,
    stride_xh,
    stride_cn,
    stride_ch,
    stride_cp,
    stride_en,
    stride_eh,
    stride_ee,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    LEN: tl.constexpr,
    LEN_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITION: tl.constexpr,
):
    """Keys or values: the entry that ``position`` completes."""
    dims = tl.arange(0, D_PAD)
    x = token_vectors(
        x_ptr, cache_ptr, table, token, position, chunk_first, head, dims,
        stride_xt, stride_xh, stride_cn, stride_ch, stride_cp, D, LEN, LEN_PAD, PAGE,
    )  # fmt: skip
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        partners = tl.where(dims < ROTARY, (dims + HALF) % ROTARY, dims)
        y = token_vectors(
            x_ptr, cache_ptr, table, token, position, chunk_first, head, partners,
            stride_xt, stride_xh, stride_cn, stride_ch, stride_cp, D, LEN, LEN_PAD, PAGE,
        )  # fmt: skip
        first = position - (LEN - 1)
        rotated = (dims < ROTARY)[None, :]
        cos, sin = _turn(inv_freq_ptr, first + tl.arange(0, LEN_PAD), dims, ROTARY)
        cos_back, sin_back = tl.where(rotated, cos / rope_scale, 1.0), -sin / rope_scale
        back_x = x * cos_back + tl.where(rotated, y * sin_back, 0.0)
        back_y = y * cos_back - tl.where(rotated, x * sin_back, 0.0)
        entry_x = _reduce(
            back_x,
            phi_position_ptr,
            phi_weight_ptr,
            head,
            dims,
            D,
            LEN,
            LEN_PAD,
            WEIGHTED,
            POSITION,
        )
        entry_y = _reduce(
            back_y, phi_position_ptr, phi_weight_ptr, head, partners, D, LEN, LEN_PAD, WEIGHTED,
            POSITION,
        )  # fmt: skip
        cos, sin = _turn(inv_freq_ptr, first + tl.arange(0, 1), dims, ROTARY)
        turned = entry_x[None, :] * cos * rope_scale + entry_y[None, :] * sin * rope_scale
        entry = tl.sum(tl.where(rotated, turned, entry_x[None, :]), 0)
    else:
        entry = _reduce(
            x, phi_position_ptr, phi_weight_ptr, head, dims, D, LEN, LEN_PAD, WEIGHTED, POSITION
        )
    # Filed with the page of its last token, counted from l/d - 1 strides before the page.
    place = position % PAGE // STRIDE
    to = entry_ptr + block * stride_en + head * stride_eh + place * stride_ee
    tl.store(to + dims, entry.to(entry_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def _copy(
    x_ptr,
    cache_ptr,
    tokens,
    slots,
    offsets,
    live,
    head,
    stride_xt,
    stride_xh,
    stride_cn,
    stride_ch,
    stride_cp,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    dims = tl.arange(0, D_PAD)
    keep = live[:, None] & (dims < D)[None, :]
    at = tokens.to(tl.int64) * stride_xt + head * stride_xh
    x = tl.load(x_ptr + at[:, None] + dims[None, :], mask=keep)
    at = slots * stride_cn + head * stride_ch + offsets * stride_cp
    tl.store(cache_ptr + at[:, None] + dims[None, :], x.to(cache_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_tokens"])
def _write(
    k_ptr,  # [T, Hkv, Dk]
    v_ptr,  # [T, Hkv, Dv]
    cache_k_ptr,
    cache_v_ptr,
    entry_k_ptr,
    entry_v_ptr,
    position_k_ptr,
    position_v_ptr,
    weight_k_ptr,
    weight_v_ptr,
    inv_freq_ptr,
    rope_scale,
    positions_ptr,
    token_rows_ptr,
    cu_seqlens_ptr,
    block_table_ptr,
    slot_table_ptr,
    num_tokens,
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
    stride_ekn,
    stride_ekh,
    stride_eke,
    stride_evn,
    stride_evh,
    stride_eve,
    stride_blocks,
    stride_slots,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    TOKENS: tl.constexpr,
    LEN: tl.constexpr,
    LEN_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WEIGHTED_K: tl.constexpr,
    WEIGHTED_V: tl.constexpr,
    POSITION_K: tl.constexpr,
    POSITION_V: tl.constexpr,
):
    head = tl.program_id(0)
    first = tl.program_id(1) * TOKENS
    tokens = first + tl.arange(0, TOKENS)
    position = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=-1).to(tl.int32)
    live = position >= 0
    rows = tl.load(token_rows_ptr + tokens, mask=live, other=0)
    slots = tl.load(
        slot_table_ptr + rows.to(tl.int64) * stride_slots + position // PAGE, mask=live, other=0
    ).to(tl.int64)
    # One program writes keys or values: neither waits for the other.
    if tl.program_id(2) == 0:
        _copy(
            k_ptr, cache_k_ptr, tokens, slots, position % PAGE, live, head,
            stride_kt, stride_kh, stride_ckn, stride_ckh, stride_ckp, DK, DK_PAD,
        )  # fmt: skip
    else:
        _copy(
            v_ptr, cache_v_ptr, tokens, slots, position % PAGE, live, head,
            stride_vt, stride_vh, stride_cvn, stride_cvh, stride_cvp, DV, DV_PAD,
        )  # fmt: skip
    if ENTRIES:
        for token in range(first, tl.minimum(first + TOKENS, num_tokens)):
            at = tl.load(positions_ptr + token).to(tl.int32)
            if (at + 1 >= LEN) & ((at + 1 - LEN) % STRIDE == 0):
                row = tl.load(token_rows_ptr + token)
                chunk_first = at - (token - tl.load(cu_seqlens_ptr + row))
                table = slot_table_ptr + row.to(tl.int64) * stride_slots
                blocks = block_table_ptr + row.to(tl.int64) * stride_blocks
                block = tl.load(blocks + at // PAGE).to(tl.int64)
                if tl.program_id(2) == 0:
                    _write_part(
                        k_ptr, cache_k_ptr, entry_k_ptr, position_k_ptr, weight_k_ptr,
                        inv_freq_ptr, rope_scale, table, block, token, at, chunk_first, head,
                        stride_kt, stride_kh, stride_ckn, stride_ckh, stride_ckp,
                        stride_ekn, stride_ekh, stride_eke,
                        DK, DK_PAD, ROTARY, LEN, LEN_PAD, STRIDE, PAGE, WEIGHTED_K, POSITION_K,
                    )  # fmt: skip
                else:
                    _write_part(
                        v_ptr, cache_v_ptr, entry_v_ptr, position_v_ptr, weight_v_ptr,
                        inv_freq_ptr, rope_scale, table, block, token, at, chunk_first, head,
                        stride_vt, stride_vh, stride_cvn, stride_cvh, stride_cvp,
                        stride_evn, stride_evh, stride_eve,
                        DV, DV_PAD, 0, LEN, LEN_PAD, STRIDE, PAGE, WEIGHTED_V, POSITION_V,
                    )  # fmt: skip


def _parameter(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x.contiguous()


def _launch_write(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    compressed: CompressedKV | None,
    batch: StepBatch,
    nsa: NSAShape,
    compressor: Compressor,
    in_kernel: bool,
) -> None:
    entries = kv if compressed is None else compressed
    phi_k, phi_v, inv_freq = compressor.k, compressor.v, compressor.inv_freq
    tokens = 1 if batch.max_query_len <= 8 else _PREFILL_TOKENS
    _write[k.shape[1], triton.cdiv(batch.num_tokens, tokens), 2](
        k, v, kv.k, kv.v, entries.k, entries.v,
        _parameter(phi_k.position, k), _parameter(phi_v.position, k),
        _parameter(phi_k.weight, k) if in_kernel else k,
        _parameter(phi_v.weight, k) if in_kernel else k,
        _parameter(inv_freq, k), compressor.rope_scale,
        batch.positions, batch.token_rows, batch.cu_seqlens_q, batch.block_table, batch.slot_table,
        batch.num_tokens, *k.stride()[:2], *v.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3],
        *entries.k.stride()[:3], *entries.v.stride()[:3],
        batch.block_table.stride(0), batch.slot_table.stride(0),
        ROTARY=0 if inv_freq is None or not in_kernel else 2 * inv_freq.shape[0], TOKENS=tokens,
        LEN=nsa.compress_len, LEN_PAD=triton.next_power_of_2(nsa.compress_len),
        STRIDE=nsa.compress_stride, ENTRIES=in_kernel,
        WEIGHTED_K=phi_k.kind is CompressKind.WEIGHTED,
        WEIGHTED_V=phi_v.kind is CompressKind.WEIGHTED,
        POSITION_K=phi_k.position is not None, POSITION_V=phi_v.position is not None,
        num_warps=4, **head_sizes(kv, nsa),
    )  # fmt: skip


def _check_weights(phi: Phi, heads: int, nsa: NSAShape) -> None:
    if phi.kind is CompressKind.WEIGHTED:
        check(phi.weight is not None, "φ of kind weighted lacks a weight")
        assert phi.weight is not None
        expected = (heads, nsa.compress_len)
        check(phi.weight.shape == expected, "weights must be [Hkv, l]", weight=phi.weight)


def kv_write(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    compressed: CompressedKV | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    compressor: Compressor,
) -> None:
    """Write K/V of every token, and every compressed entry that these tokens complete.

    ``k`` [T, Hkv, Dk] and ``v`` [T, Hkv, Dv] are rounded to the cache's type into slot
    ``slot_table[row, pos // P]``. Entry i is completed by token i·d + l − 1 and goes to block
    ``block_table[row, page of that token]``. ``compressed`` None: a dense model.
    """
    check(k.shape[:2] == v.shape[:2], "k and v differ in tokens or heads", k=k, v=v)
    check(k.shape[0] == batch.num_tokens, "k has another number of tokens than the batch", k=k)
    check(k.shape[2] == kv.k.shape[3] and v.shape[2] == kv.v.shape[3], "widths differ", k=k, v=v)
    check(k.stride(2) == 1 and v.stride(2) == 1, "k and v must be dense in their last axis", k=k)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", kv=kv.k, P=nsa.page)
    _check_weights(compressor.k, k.shape[1], nsa)
    _check_weights(compressor.v, v.shape[1], nsa)
    products = not {compressor.k.kind, compressor.v.kind} <= set(_IN_KERNEL)
    in_kernel = compressed is not None and not products
    _launch_write(k, v, kv, compressed, batch, nsa, compressor, in_kernel)
    if compressed is not None and products:
        write_products(k, v, kv, compressed, batch, nsa, compressor)
