"""Selected and window attention with gradients: whole packed sequences of whole pages."""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import BranchStats, NSAShape, PagedKV, StepBatch, as_pages
from .key_backward import CHUNK, key_backward
from .page_readers import find_readers
from .page_union import PageUnion, unite_pages
from .paged_tiles import check_sparse
from .query_backward import query_backward
from .sparse_pass import sparse_pass
from .tuning import sparse_gradient_tile, sparse_tile
from .window_backward import window_backward
from .window_pass import window_pass

Tensor = torch.Tensor


def selected_with_lse(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Attention over each token's selected blocks: out [T, Hq, Dv], LSE [T, Hq] fp32.

    ``q`` [T, Hq, Dk], ``k`` [T, Hkv, Dk] and ``v`` [T, Hkv, Dv] of a step that is whole sequences
    of whole pages; ``selection`` [T, Hkv, n] as ``select_blocks`` gives it. Last come the pages as
    they were listed for its tiles, for ``sparse_backward``. Raises ``ContractError`` where shapes
    do not fit.
    """
    kv = _pages(q, k, v, batch, nsa)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    group, width = q.shape[1] // k.shape[1], max(k.shape[2], v.shape[2])
    tokens = sparse_tile(group, width).tokens
    union = unite_pages(selection, None, batch, nsa=nsa, tile_tokens=tokens)
    out = sparse_pass(q, kv, selection, batch, nsa=nsa, lse=lse, union=union)
    # The gradient of queries has tiles of the same tokens.
    assert tokens == sparse_gradient_tile(group, width).tokens
    return out, lse, (union.items, union.counts, union.near_bits)


def window_with_lse(
    q: Tensor, k: Tensor, v: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor]:
    """Attention over each token's last w tokens: as ``selected_with_lse``."""
    kv = _pages(q, k, v, batch, nsa)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return window_pass(q, kv, batch, nsa=nsa, lse=lse), lse


def sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    d_out: Tensor,
    selected: BranchStats | None,
    window: BranchStats | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    listed: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v`` through the branches whose statistics are given.

    ``d_out`` [T, Hq, Dv] is the gradient of the gated sum: gates are in the statistics. ``listed``
    is what ``selected_with_lse`` gave; without it pages are listed once more.
    """
    kv = _pages(q, k, v, batch, nsa)
    check(d_out.stride(2) == 1, "the gradient must have unit last stride", d_out=d_out)
    if selected is None and window is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    readers, parts = None, None
    if selected is not None:
        readers = find_readers(selection, batch, nsa=nsa, chunk=CHUNK)
        parts = key_backward(q, kv, readers, d_out, selected, nsa=nsa)
    dk, dv = window_backward(q, kv, d_out, window, parts, readers, batch, nsa=nsa)
    del readers, parts  # before the largest gradient is made
    union = PageUnion(*listed) if listed else None
    dq = query_backward(q, kv, selection, d_out, selected, window, batch, nsa=nsa, union=union)
    return dq, dk, dv


def _pages(q: Tensor, k: Tensor, v: Tensor, batch: StepBatch, nsa: NSAShape) -> PagedKV:
    kv = PagedKV(as_pages(k, nsa.page), as_pages(v, nsa.page))
    check_sparse(q, kv, batch, nsa)
    lens = batch.row_lens or ()
    whole = len(lens) > 0 and all(n == c and n % nsa.page == 0 for n, c in lens)
    check(whole, "the step is not whole sequences of whole pages", row_lens=lens, P=nsa.page)
    return kv
