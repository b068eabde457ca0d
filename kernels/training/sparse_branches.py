"""The selected and window branches and the gated sum of all three, as one autograd function.

Kept for the backward pass: the inputs, the three branches' outputs, two LSEs and the pages as they
were listed for tiles of queries.
"""

from __future__ import annotations

from collections.abc import Set
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..dispatch import ops_for
from ..shapes import Branch, NSAShape
from .packed import PackedBatch

Tensor = torch.Tensor


def sparse_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_compressed: Tensor | None,
    gate_logits: Tensor,
    selection: Tensor,
    batch: PackedBatch,
    *,
    nsa: NSAShape,
    branches: Set[Branch],
) -> Tensor:
    """Σ sigmoid(gate) · branch over ``branches``, [T, Hq, Dv]: with gradients of all but selection.

    ``q`` [T, Hq, Dk], ``k`` [T, Hkv, Dk], ``v`` [T, Hkv, Dv], ``gate_logits`` [T, Hq, 3],
    ``selection`` [T, Hkv, n]; ``out_compressed`` [T, Hq, Dv] where the compressed branch is wanted.
    """
    out: Tensor = _SparseBranches.apply(  # type: ignore[no-untyped-call]
        q, k, v, out_compressed, gate_logits, selection, batch, nsa, frozenset(branches)
    )
    return out


class _SparseBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_compressed: Tensor | None,
        gate_logits: Tensor,
        selection: Tensor,
        batch: PackedBatch,
        nsa: NSAShape,
        branches: frozenset[Branch],
    ) -> Tensor:
        ops = ops_for(q.device)
        out_selected, lse_selected, out_window, lse_window, listed = None, None, None, None, ()
        if Branch.SELECTED in branches:
            out_selected, lse_selected, listed = ops.selected_with_lse(
                q, k, v, selection, batch.step, nsa=nsa
            )
        if Branch.WINDOW in branches:
            out_window, lse_window = ops.window_with_lse(q, k, v, batch.step, nsa=nsa)
        outs = (out_compressed, out_selected, out_window)
        lses = (lse_selected, lse_window)
        ctx.save_for_backward(q, k, v, selection, gate_logits, *outs, *lses, *listed)
        ctx.ops, ctx.batch, ctx.nsa = ops, batch, nsa
        out: Tensor = ops.gated_fusion(*_filled(outs), gate_logits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, selection, gate_logits, *kept = ctx.saved_tensors
        outs, (lse_selected, lse_window), listed = kept[:3], kept[3:5], tuple(kept[5:])
        ops: ModuleType = ctx.ops
        d_out = d_out.contiguous()
        d_gates, d_compressed, selected, window = ops.gate_backward(
            d_out,
            _filled(outs),
            lse_selected,
            lse_window,
            gate_logits,
            with_compressed=outs[0] is not None,
        )
        dq, dk, dv = ops.sparse_backward(
            q, k, v, selection, d_out, selected, window, ctx.batch.step, nsa=ctx.nsa, listed=listed
        )
        return dq, dk, dv, d_compressed, d_gates, None, None, None, None


def _filled(outs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A left-out branch stands in as another: its gate is 0, and what it would add is finite."""
    some = next(out for out in outs if out is not None)
    compressed, selected, window = (some if out is None else out for out in outs)
    return compressed, selected, window
