"""RMSNorm, rotary embedding and SwiGLU, each one pass over its bytes.

Values are rounded where the reference rounds them: the residual sum, the normalised row before the
weight, and the product with the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check

Tensor = torch.Tensor

_HEAD_TILE = 2048  # elements of one program's heads
_SWIGLU_TILE = 1024


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of the rows of ``x`` [..., H] with ``weight`` [H], as [..., H] in ``x``'s type.

    Statistics are fp32; the normalised row is rounded to ``x``'s type before the weight is
    multiplied on. Raises ``ContractError`` where the lengths differ.
    """
    _check_rows(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(rows, rows, weight, out, out, eps, added=False)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """``residual`` + ``x`` [T, H], normalised and as it is: (normed, new_residual).

    Raises ``ContractError`` where shapes or types differ.
    """
    same = x.shape == residual.shape and x.dtype == residual.dtype
    check(same, "x and residual differ in shape or type", x=x, residual=residual)
    _check_rows(x, weight)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    rows, residual_rows = (y.reshape(-1, y.shape[-1]) for y in (x, residual))
    _launch_norm(rows, residual_rows, weight, out, total, eps, added=True)
    return out, total


def _check_rows(x: Tensor, weight: Tensor) -> None:
    check(x.shape[-1] == weight.shape[0], "weight and rows differ in length", x=x, weight=weight)
    check(x.stride(-1) == 1, "rows must be dense", x=x)


def _launch_norm(
    rows: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
    *,
    added: bool,
) -> None:
    if out.numel() == 0:
        return
    width = rows.shape[1]
    block = triton.next_power_of_2(width)
    together = max(1, 512 // block)  # short rows; a fixed number, so that bytes don't depend on T
    _norm_kernel[(triton.cdiv(rows.shape[0], together),)](
        rows,
        residual,
        weight,
        out,
        total,
        rows.shape[0],
        rows.stride(0),
        residual.stride(0),
        eps,
        H=width,
        BLOCK=block,
        ROWS=together,
        ADDED=added,
        num_warps=max(1, min(block // 512, 16)),
    )


@triton.jit
def _normed(x, weight, eps, H: tl.constexpr):
    """RMSNorm of the rows of ``x`` [R, D], of which H values count and the rest are 0."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / H + eps)
    rounded = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    return (rounded * weight.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    out_ptr,
    total_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (at < H)
    weight = tl.load(weight_ptr + at, mask=at < H, other=0.0)
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)  # [ROWS, BLOCK]
    if ADDED:
        residual = tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * H + at, x, mask=inside)
    tl.store(out_ptr + row * H + at, _normed(x, weight, eps, H), mask=inside)


def qkv_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim_k: int,
    head_dim_v: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection, normalise heads where weights are given, and rotate q and k.

    ``qkv`` [T, (Hq+Hkv)·Dk + Hkv·Dv], rows dense; ``cos``, ``sin`` [T, Dr/2] fp32, of which the
    first Dr dimensions are rotated, halves paired; ``q_norm`` and ``k_norm`` [Dk]. Returns
    q [T, Hq, Dk], k [T, Hkv, Dk] and v [T, Hkv, Dv]; v is a view of ``qkv``. Raises
    ``ContractError`` where shapes do not fit.
    """
    num_qk = (num_q_heads + num_kv_heads) * head_dim_k
    width = num_qk + num_kv_heads * head_dim_v
    check(qkv.shape[-1] == width, "qkv does not hold q, k and v", qkv=qkv, width=width)
    check(qkv.stride(-1) == 1, "rows must be dense", qkv=qkv)
    check(cos.shape == sin.shape, "cos and sin differ in shape", cos=cos, sin=sin)
    check(2 * cos.shape[-1] <= head_dim_k, "rotary dimensions exceed the head", cos=cos)
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_q_heads, head_dim_k)
    k = qkv.new_empty(tokens, num_kv_heads, head_dim_k)
    v = qkv[:, num_qk:].view(tokens, num_kv_heads, head_dim_v)
    if tokens:
        _launch_rope(qkv, cos.contiguous(), sin.contiguous(), q, k, q_norm, k_norm, eps)
    return q, k, v


def _launch_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    (tokens, hq, dim), hkv = q.shape, k.shape[1]
    padded = triton.next_power_of_2(dim)
    heads = max(1, min(_HEAD_TILE // padded, triton.next_power_of_2(hq)))
    programs = triton.cdiv(hq, heads) + triton.cdiv(hkv, heads)
    _rope_kernel[tokens, programs](
        qkv,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q,
        k,
        qkv.stride(0),
        eps,
        HQ=hq,
        HKV=hkv,
        D=dim,
        D_PAD=padded,
        HALF=cos.shape[1],
        HEADS=heads,
        NORM_Q=q_norm is not None,
        NORM_K=k_norm is not None,
        num_warps=4 if heads * padded >= 1024 else 2,
    )


@triton.jit
def _rope_kernel(
    qkv_ptr,  # [T, (Hq + Hkv)·Dk + ...]
    cos_ptr,  # [T, HALF]
    sin_ptr,
    q_norm_ptr,  # [Dk]
    k_norm_ptr,
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [T, Hkv, Dk]
    stride,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
):
    """HEADS heads of q, or of k, of one token."""
    Q_PROGRAMS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < Q_PROGRAMS:
        _turn_heads(
            qkv_ptr + token * stride, cos_ptr + token * HALF, sin_ptr + token * HALF, q_norm_ptr,
            q_ptr + token * (HQ * D), part * HEADS, eps, HQ, D, D_PAD, HALF, HEADS, NORM_Q,
        )  # fmt: skip
    else:
        _turn_heads(
            qkv_ptr + token * stride + HQ * D, cos_ptr + token * HALF, sin_ptr + token * HALF,
            k_norm_ptr, k_ptr + token * (HKV * D), (part - Q_PROGRAMS) * HEADS, eps,
            HKV, D, D_PAD, HALF, HEADS, NORM_K,
        )  # fmt: skip


@triton.jit
def _turn_heads(
    x_ptr,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    out_ptr,
    first,
    eps,
    NUM: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads ``first``... of NUM, one after the other at ``x_ptr``, to the same place in ``out``."""
    heads = first + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, D_PAD)[None, :]
    rotated = dims < 2 * HALF
    # The other one of the pair, read again: it comes from the cache, and needs no shuffle.
    partners = tl.where(rotated, tl.where(dims < HALF, dims + HALF, dims - HALF), dims)
    inside = (heads < NUM) & (dims < D)
    x = tl.load(x_ptr + heads * D + dims, mask=inside, other=0.0)  # [HEADS, D_PAD]
    y = tl.load(x_ptr + heads * D + partners, mask=inside, other=0.0)
    if NORM:
        x = _normed(x, tl.load(norm_ptr + dims, mask=dims < D, other=0.0), eps, D)
        y = _normed(y, tl.load(norm_ptr + partners, mask=dims < D, other=0.0), eps, D)
    angle = tl.where(dims < HALF, dims, dims - HALF)
    cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)
    sin = tl.where(dims < HALF, -sin, sin)
    turned = x.to(tl.float32) * cos + y.to(tl.float32) * sin
    tl.store(out_ptr + heads * D + dims, turned.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, *, uniform: bool = False) -> Tensor:
    """silu(gate) · up of ``gate_up`` [T, 2·I], gate first, as [T, I]; fp32 inside, rounded once.

    Rows are ``uniform`` here whether asked to be or not. Raises ``ContractError`` for an odd width.
    """
    check(gate_up.shape[-1] % 2 == 0, "gate_up has an odd width", gate_up=gate_up)
    check(gate_up.stride(-1) == 1, "rows must be dense", gate_up=gate_up)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    if out.numel():
        block = min(triton.next_power_of_2(width), _SWIGLU_TILE)
        _swiglu_kernel[tokens, triton.cdiv(width, block)](
            gate_up, out, gate_up.stride(0), I=width, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, stride, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < I
    gate = tl.load(x_ptr + token * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * stride + I + at, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * I + at, out.to(out_ptr.dtype.element_ty), mask=inside)
