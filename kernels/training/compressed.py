"""The compressed branch in training: attention over entries, its selection, block importance."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..contracts import check
from ..dispatch import ops_for
from ..reference.compressed_training import wide_type
from ..reference.select_blocks import spread_over_blocks
from ..shapes import NSAShape
from .compress import compress_packed
from .packed import PackedBatch

__all__ = ["block_importance", "compress_packed", "compressed_branch"]

Tensor = torch.Tensor


def compressed_branch(
    q: Tensor, k_entries: Tensor, v_entries: Tensor, batch: PackedBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor]:
    """Attention [T, Hq, Dv] over visible entries, and the selection [T, Hkv, n] it yields, int32.

    ``q`` [T, Hq, Dk]; ``k_entries`` [T/d, Hkv, Dk] and ``v_entries`` [T/d, Hkv, Dv] by packed slot,
    as ``compress_packed`` gives them. Tokens that see no entry get 0. The selection has no
    gradient; slots that are no entries get one of 0. Raises ``ContractError`` where shapes do not
    fit.
    """
    found: tuple[Tensor, Tensor] = _CompressedBranch.apply(  # type: ignore[no-untyped-call]
        q, k_entries, v_entries, batch, nsa
    )
    return found


class _CompressedBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_entries: Tensor,
        v_entries: Tensor,
        batch: PackedBatch,
        nsa: NSAShape,
    ) -> tuple[Tensor, Tensor]:
        ops = ops_for(q.device)
        out, lse, selection = ops.compressed_with_lse(q, k_entries, v_entries, batch.step, nsa=nsa)
        ctx.save_for_backward(q, k_entries, v_entries, out, lse)
        ctx.mark_non_differentiable(selection)
        ctx.ops, ctx.batch, ctx.nsa = ops, batch, nsa
        return out, selection

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _selection: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        dq, dk, dv = ctx.ops.compressed_backward(*operands, d_out, ctx.batch.step, nsa=ctx.nsa)
        return dq, dk, dv, None, None


def block_importance(
    q: Tensor,
    k_entries: Tensor,
    batch: PackedBatch,
    *,
    nsa: NSAShape,
    tokens: Tensor | None = None,
) -> Tensor:
    """Block scores [t, Hkv, blocks] that the selection ranks by, differentiable, in fp32.

    ``q`` [t, Hq, Dk] are the queries of ``tokens`` [t], places in the packed batch; None: of all.
    Column j is block j of the token's own sequence, up to the longest one's; those that hold no
    entry it sees are 0. A token's row sums to G · l/d, or to 0 where no entry is seen. Holds
    [t, Hq, T/d] scores: meant for a sample of tokens. Source: arXiv 2502.11089, equations 8 to 10.
    """
    places = torch.arange(batch.num_tokens, device=q.device) if tokens is None else tokens
    check(places.shape == q.shape[:1], "one place per query", q=q, tokens=places)
    starts = places - batch.positions[places]  # [t], of each token's sequence
    d, lead = nsa.compress_stride, nsa.overlap - 1
    slots = torch.arange(k_entries.shape[0], device=q.device)
    first, end = starts // d + lead, (places + 1) // d
    seen = (slots >= first[:, None]) & (slots < end[:, None])  # [t, T/d]
    is_entry = batch.positions[::d] >= nsa.compress_len - d
    k = torch.where(is_entry[:, None, None], k_entries.to(wide_type(q)), 0)
    queries = torch.unflatten(q.to(k.dtype), 1, (k.shape[1], -1))
    scores = torch.einsum("tkgd,ckd->tkgc", queries, k) * q.shape[2] ** -0.5
    # Finite where hidden: a row without entries would turn the gradient into NaN.
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(k.dtype).min)
    share = (scores.softmax(-1) * seen[:, None, None]).sum(2)  # [t, Hkv, T/d]
    pages = spread_over_blocks(share[..., lead:], nsa)
    width = batch.step.max_context_len // nsa.page
    own = starts[:, None] // nsa.page + torch.arange(width, device=q.device)
    inside = own <= (places // nsa.page)[:, None]
    own = own.clamp(max=pages.shape[-1] - 1)[:, None].expand(-1, pages.shape[1], -1)
    return pages.gather(2, own) * inside[:, None]
