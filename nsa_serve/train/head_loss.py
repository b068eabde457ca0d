"""Cross-entropy and distillation through the head, in chunks: 64k · 49k logits are never held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .row_ops import RowOps

Tensor = torch.Tensor
_CHUNK = 4096  # tokens whose logits are held at once


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Of each token [R] fp32, without gradient."""

    entropy: Tensor
    divergence: Tensor
    right: Tensor


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    ce: Tensor,
    kl: Tensor,
    taught: Tensor | None,
    ops: RowOps,
) -> tuple[Tensor, TokenLosses]:
    """Σ ce · cross-entropy + kl · KL(teacher ‖ student), and each token's share of it.

    ``hidden`` [R, H] and the teacher's ``taught`` [R, H] or None; ``head`` [V, H], which is frozen;
    ``targets``, ``ce`` and ``kl`` [R].
    """
    loss, *rows = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, ce, kl, taught, ops
    )
    return loss, TokenLosses(*rows)


class _HeadLoss(torch.autograd.Function):
    """The gradient is computed beside the loss, so that logits live for one chunk only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        ce: Tensor,
        kl: Tensor,
        taught: Tensor | None,
        ops: RowOps,
    ) -> tuple[Tensor, ...]:
        parts = [
            _chunk(hidden, head, targets, ce, kl, taught, ops, slice(at, at + _CHUNK))
            for at in range(0, hidden.shape[0], _CHUNK)
        ]
        columns = zip(*parts, strict=True)
        grad, entropy, divergence, right = (torch.cat(column) for column in columns)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy, divergence, right)
        return (ce * entropy + kl * divergence).sum(), entropy, divergence, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * d_loss).to(grad.dtype), None, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    ce: Tensor,
    kl: Tensor,
    taught: Tensor | None,
    ops: RowOps,
    rows: slice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    taught_logits = None if taught is None else taught[rows] @ head.T
    grad, entropy, divergence, right = ops.head(
        hidden[rows] @ head.T, targets[rows], ce[rows], taught_logits, kl[rows]
    )
    return grad @ head, entropy, divergence, right
