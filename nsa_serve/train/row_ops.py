"""Row-wise ops of a layer with gradients: what serving does in place, kept small in memory.

Each saves only its inputs and computes the rest again in the backward pass. Forward and backward
are plain functions, so that ``torch.compile`` makes one kernel of each where it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..models.families.placement import FusedRows

Tensor = torch.Tensor
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RowOps:
    """The functions of both passes, as they are or compiled."""

    norm: Function
    norm_backward: Function
    split: Function
    split_backward: Function
    swiglu: Function
    swiglu_backward: Function
    head: Function

    @classmethod
    def build(cls, *, compiled: bool) -> RowOps:
        """``compiled`` fuses each into one kernel; its first calls then take seconds."""
        functions: tuple[Function, ...] = (
            *(_norm, _norm_backward, _split, _split_backward),
            *(_swiglu, _swiglu_backward, head_gradient),
        )
        if compiled:
            functions = tuple(torch.compile(function, dynamic=False) for function in functions)
        return cls(*functions)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``x`` + ``residual`` [T, H], normalised and as it is; ``weight`` [H] is frozen."""
        out: tuple[Tensor, Tensor] = _AddRmsNorm.apply(  # type: ignore[no-untyped-call]
            x, residual, weight, eps, self
        )
        return out

    def split_rotate(
        self, fused: Tensor, cos: Tensor, sin: Tensor, rows: FusedRows, dim: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [T, Hq, D] and k [T, Hkv, D] rotated, v [T, Hkv, D] and gate logits [T, Hq, 3].

        ``fused`` [T, rows]; ``cos`` and ``sin`` [T, D/2]. Without gate rows the last is [T, 0, 3].
        """
        out: tuple[Tensor, Tensor, Tensor, Tensor] = _SplitRotate.apply(  # type: ignore[no-untyped-call]
            fused, cos, sin, rows, dim, self
        )
        return out

    def swiglu_of(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up of ``gate_up`` [T, 2·I], as [T, I]."""
        out: Tensor = _SwiGLU.apply(gate_up, self)  # type: ignore[no-untyped-call]
        return out


def _norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    wide = total.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale).to(total.dtype) * weight, total


def _norm_backward(
    d_out: Tensor, d_total: Tensor, total: Tensor, weight: Tensor, eps: float
) -> Tensor:
    wide = total.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, grad = wide * scale, d_out.float() * weight.float()
    inner = grad - normed * (grad * normed).mean(-1, keepdim=True)
    return (inner * scale + d_total.float()).to(total.dtype)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, ops: RowOps
    ) -> tuple[Tensor, Tensor]:
        out, total = ops.norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.ops = eps, ops
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad = ctx.ops.norm_backward(d_out, d_total, total, weight, ctx.eps)
        return grad, grad, None, None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``heads`` [T, H, D] in fp32, halves paired."""
    first, second = heads.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads.dtype)


def _split(
    fused: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...], dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = torch.split(fused, list(sizes), 1)
    q, k, v = (torch.unflatten(part, 1, (-1, dim)) for part in parts[:3])
    gates = torch.unflatten(parts[3], 1, (sizes[3] // 3, 3))
    return _turn(q, cos, sin), _turn(k, cos, sin), v.contiguous(), gates.contiguous()


def _split_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, d_gates: Tensor, cos: Tensor, sin: Tensor, padding: int
) -> Tensor:
    parts = [_turn(dq, cos, -sin), _turn(dk, cos, -sin), dv, d_gates]
    flat = [part.flatten(1) for part in parts]
    return F.pad(torch.cat(flat, 1), (0, padding))


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, cos: Tensor, sin: Tensor, rows: FusedRows, dim: int, ops: RowOps
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.padding, ctx.ops = rows.padding, ops
        sizes = (rows.q, rows.k, rows.v, rows.gate, rows.padding)
        out: tuple[Tensor, Tensor, Tensor, Tensor] = ops.split(fused, cos, sin, sizes, dim)
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, d_gates: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = ctx.ops.split_backward(dq, dk, dv, d_gates, *ctx.saved_tensors, ctx.padding)
        return grad, None, None, None, None, None


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate.float()) * up).to(gate_up.dtype)


def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    sigmoid, grad = gate.sigmoid(), d_out.float()
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, ops: RowOps) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.ops = ops
        out: Tensor = ops.swiglu(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return ctx.ops.swiglu_backward(d_out, *ctx.saved_tensors), None


def head_gradient(
    logits: Tensor, targets: Tensor, ce: Tensor, taught: Tensor | None, kl: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of tokens and the gradient of their weighted sum by the logits.

    ``logits`` and the teacher's ``taught`` [R, V], ``targets`` [R]; ``ce`` and ``kl`` [R] weigh
    each token's cross-entropy and KL(teacher ‖ student). Returns the gradient [R, V] in the
    logits' type, and cross-entropy, KL and whether the target is the likeliest, each [R] fp32.
    """
    logp = logits.float().log_softmax(-1)
    index = targets[:, None]
    entropy = -logp.gather(1, index)[:, 0]
    right = (logp.argmax(-1) == targets).float()
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    if taught is None:
        grad = ce[:, None] * (logp.exp() - hit.float())
        return grad.to(logits.dtype), entropy, torch.zeros_like(entropy), right
    taught_logp = taught.float().log_softmax(-1)
    p = taught_logp.exp()
    divergence = (p * (taught_logp - logp)).sum(-1)
    grad = (ce + kl)[:, None] * logp.exp() - ce[:, None] * hit.float() - kl[:, None] * p
    return grad.to(logits.dtype), entropy, divergence, right
