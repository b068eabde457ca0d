"""NSA over packed sequences, differentiable: what a layer in training calls."""

from __future__ import annotations

from collections.abc import Set

import torch

from ..contracts import check
from ..shapes import Branch, Compressor, NSAShape
from .compressed import compress_packed, compressed_branch
from .packed import PackedBatch
from .sparse_branches import sparse_branches

Tensor = torch.Tensor

ALL_BRANCHES: Set[Branch] = frozenset(Branch)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    batch: PackedBatch,
    *,
    nsa: NSAShape,
    compressor: Compressor,
    branches: Set[Branch] = ALL_BRANCHES,
    selection: Tensor | None = None,
    k_entries: Tensor | None = None,
) -> Tensor:
    """Gated sum [T, Hq, Dv] of NSA's three branches (arXiv 2502.11089, equation 5).

    ``q`` [T, Hq, Dk] and ``k`` [T, Hkv, Dk] are rotated; ``v`` [T, Hkv, Dv]; ``gate_logits``
    [T, Hq, 3] in the order compressed, selected, window. Gradients reach all four and φ's tensors;
    φ learns through the compressed branch, the selection has none. A branch not among ``branches``
    has a gate of 0. ``selection`` [T, Hkv, n] int32, ascending and padded with −1, takes the place
    of the compressed branch's; ``k_entries`` [T/d, Hkv, Dk] are φ of ``k`` where it is known
    already, as ``compress_keys`` gives it. Raises ``ContractError`` where shapes do not fit.
    """
    wanted = (*q.shape[:2], len(Branch))
    check(gate_logits.shape == wanted, "gates are not [T, Hq, 3]", gate_logits=gate_logits)
    check(len(branches) > 0, "no branch is left", branches=sorted(branches))
    if k_entries is None:
        k_entries = compress_keys(k, batch, nsa=nsa, compressor=compressor)
    v_entries = compress_packed(v, compressor.v, batch, nsa=nsa, inv_freq=None, rope_scale=1.0)
    out_compressed, chosen = compressed_branch(q, k_entries, v_entries, batch, nsa=nsa)
    return sparse_branches(
        q,
        k,
        v,
        out_compressed if Branch.COMPRESSED in branches else None,
        close_gates(gate_logits, branches),
        chosen if selection is None else selection,
        batch,
        nsa=nsa,
        branches=branches,
    )


def compress_keys(
    k: Tensor, batch: PackedBatch, *, nsa: NSAShape, compressor: Compressor
) -> Tensor:
    """Compressed keys [T/d, Hkv, Dk] of ``k`` [T, Hkv, Dk] by packed slot, differentiable."""
    inv_freq, scale = compressor.inv_freq, compressor.rope_scale
    return compress_packed(k, compressor.k, batch, nsa=nsa, inv_freq=inv_freq, rope_scale=scale)


def close_gates(gate_logits: Tensor, branches: Set[Branch]) -> Tensor:
    """``gate_logits`` [T, Hq, 3] with −inf for every branch that is not among ``branches``."""
    if len(branches) == len(Branch):
        return gate_logits
    closed = torch.tensor([branch not in branches for branch in Branch], device=gate_logits.device)
    return gate_logits.masked_fill(closed, -torch.inf)
