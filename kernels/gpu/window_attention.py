"""Sliding-window attention over the paged cache."""

from __future__ import annotations

import torch

from ..shapes import NSAShape, PagedKV, StepBatch
from .paged_tiles import check_sparse
from .window_pass import window_pass

Tensor = torch.Tensor


def window_attention(q: Tensor, kv: PagedKV, batch: StepBatch, *, nsa: NSAShape) -> Tensor:
    """Attention [T, Hq, Dv] of each token over its last ``nsa.window`` keys, itself included.

    ``q`` [T, Hq, Dk]. Padding gives 0. Raises ``ContractError`` where shapes do not fit.
    """
    check_sparse(q, kv, batch, nsa)
    return window_pass(q, kv, batch, nsa=nsa)
