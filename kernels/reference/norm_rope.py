"""RMSNorm, rotary embedding and SwiGLU: the small row-wise ops around the matrix products."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..contracts import check
from .uniform import uniform_silu

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of the rows of ``x`` [..., H] with ``weight`` [H], as [..., H] in ``x``'s type.

    Statistics are fp32. The normalised row is rounded to ``x``'s type before the weight is
    multiplied on, the order of Llama checkpoints' own code.
    """
    check(x.shape[-1] == weight.shape[0], "weight and rows differ in length", x=x, weight=weight)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    normed = x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out: Tensor = normed.to(x.dtype).mul_(weight.to(x.dtype))
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """``residual`` + ``x`` [T, H], normalised and as it is: (normed, new_residual)."""
    check(x.shape == residual.shape, "x and residual differ in shape", x=x, residual=residual)
    total = residual + x
    return rms_norm(total, weight, eps=eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in fp32 of the first Dr dimensions of ``x`` [..., D], halves paired.

    ``cos`` and ``sin`` [..., Dr/2] broadcast against ``x``; the other D − Dr dimensions pass.
    The result has ``x``'s type. Rotating by −sin undoes the rotation.
    """
    width = 2 * cos.shape[-1]
    turned = x[..., :width].float()
    swapped = turned.roll(width // 2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    out = torch.addcmul(turned * cos, swapped, sin).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat([out, x[..., width:]], -1)


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

    ``qkv`` [T, (Hq+Hkv)·Dk + Hkv·Dv]; ``cos``, ``sin`` [T, Dr/2] fp32; ``q_norm`` and ``k_norm``
    [Dk] are the per-head RMSNorm weights of Qwen3. Returns q [T, Hq, Dk], k [T, Hkv, Dk] and
    v [T, Hkv, Dv]; v is a view of ``qkv``.
    """
    sizes = [num_q_heads * head_dim_k, num_kv_heads * head_dim_k, num_kv_heads * head_dim_v]
    check(qkv.shape[-1] == sum(sizes), "qkv does not hold q, k and v", qkv=qkv, sizes=sizes)
    check(cos.shape == sin.shape, "cos and sin differ in shape", cos=cos, sin=sin)
    check(2 * cos.shape[-1] <= head_dim_k, "rotary dimensions exceed the head", cos=cos)
    tokens = qkv.shape[0]
    num_qk = num_q_heads + num_kv_heads
    heads = qkv[:, : num_qk * head_dim_k].view(tokens, num_qk, head_dim_k)
    v = qkv[:, num_qk * head_dim_k :].view(tokens, num_kv_heads, head_dim_v)
    cos, sin = cos[:, None], sin[:, None]
    if q_norm is None and k_norm is None:
        turned = rotate(heads, cos, sin)
        return turned[:, :num_q_heads], turned[:, num_q_heads:], v
    q, k = heads[:, :num_q_heads], heads[:, num_q_heads:]
    q = q if q_norm is None else rms_norm(q, q_norm, eps=eps)
    k = k if k_norm is None else rms_norm(k, k_norm, eps=eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def swiglu(gate_up: Tensor, *, uniform: bool = False) -> Tensor:
    """silu(gate) · up of ``gate_up`` [T, 2·I], gate first, as [T, I]; fp32 inside, rounded once.

    ``uniform``: a row's bytes are the same whatever other rows there are.
    """
    check(gate_up.shape[-1] % 2 == 0, "gate_up has an odd width", gate_up=gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    silu = uniform_silu if uniform else F.silu
    return silu(gate.float()).mul_(up).to(gate_up.dtype)


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """``swiglu`` [T, I] of the product of ``x`` [T, H] and ``weight`` [2·I, H]."""
    check(x.shape[1] == weight.shape[1], "x and weight differ in width", x=x, weight=weight)
    return swiglu(F.linear(x, weight))
