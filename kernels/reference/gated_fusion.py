"""The gated sum of the three branches, and the part of NSA that follows the selection."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .selected_attention import selected_attention
from .uniform import uniform_sigmoid
from .window_attention import window_attention

Tensor = torch.Tensor


def gated_fusion(
    out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gate_logits: Tensor
) -> Tensor:
    """Σ_c sigmoid(g^c) · out^c of the branches [T, Hq, Dv] (paper, equation 5): [T, Hq, Dv].

    ``gate_logits`` [T, Hq, 3] are in the order compressed, selected, window. Sums are fp32,
    or wider where the branches are.
    """
    return _fuse(out_compressed, out_selected, out_window, gate_logits, torch.sigmoid)


def _fuse(
    out_compressed: Tensor,
    out_selected: Tensor,
    out_window: Tensor,
    gate_logits: Tensor,
    sigmoid: Callable[[Tensor], Tensor],
) -> Tensor:
    check(
        gate_logits.shape == (*out_selected.shape[:2], 3), "gates are not [T, Hq, 3]", g=gate_logits
    )
    check(out_compressed.shape == out_selected.shape, "branches differ", a=out_compressed)
    check(out_window.shape == out_selected.shape, "branches differ", a=out_window)
    wide = torch.promote_types(out_selected.dtype, torch.float32)
    gates = sigmoid(gate_logits.to(wide))
    out = out_compressed.to(wide) * gates[..., 0:1]
    out.addcmul_(out_selected.to(wide), gates[..., 1:2])
    out.addcmul_(out_window.to(wide), gates[..., 2:3])
    return out.to(out_selected.dtype)


def sparse_attention(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    out_compressed: Tensor | None,
    gate_logits: Tensor | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
) -> Tensor:
    """Selected and window attention of ``q`` [T, Hq, Dk] and the gated sum: [T, Hq, Dv].

    ``gate_logits`` None stands for gates (0, 1, 0): the selected branch alone, and
    ``out_compressed`` isn't needed. ``slots`` as for ``selected_attention``.
    """
    out_selected = selected_attention(q, kv, selection, batch, nsa=nsa, slots=slots)
    if gate_logits is None:
        return out_selected
    check(out_compressed is not None, "gates need the output of the compressed branch")
    assert out_compressed is not None
    out_window = window_attention(q, kv, batch, nsa=nsa)
    sigmoid = uniform_sigmoid if batch.uniform else torch.sigmoid
    return _fuse(out_compressed, out_selected, out_window, gate_logits, sigmoid)
