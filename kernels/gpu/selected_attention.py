"""Attention over selected blocks (arXiv 2502.11089, equation 11)."""

from __future__ import annotations

import torch

from ..shapes import NSAShape, PagedKV, StepBatch
from .decode_sparse import decode_sparse_attention
from .paged_tiles import check_sparse
from .sparse_pass import sparse_pass

Tensor = torch.Tensor


def selected_attention(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
) -> Tensor:
    """Causal attention [T, Hq, Dv] of each token over the blocks it selected.

    ``q`` [T, Hq, Dk]; ``selection`` [T, Hkv, n] int32, -1 padded; ``slots`` [T, Hkv, n] int32 the
    device slots of the selection, None where the step's slot table holds. Nothing selected: 0.
    Raises ``ContractError`` where shapes do not fit.
    """
    check_sparse(q, kv, batch, nsa)
    if batch.is_short:
        return decode_sparse_attention(q, kv, selection, None, None, batch, nsa=nsa, slots=slots)
    return sparse_pass(q, kv, selection, batch, nsa=nsa, slots=slots)
