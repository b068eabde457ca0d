"""Full causal attention over the paged cache."""

from __future__ import annotations

import torch

from ..shapes import PagedKV, StepBatch
from .paged import QueryTile, check_queries, gather_both, long_rows, short_tokens
from .softmax_attention import attend_pages, attend_tile, causal_bias

Tensor = torch.Tensor

_TILE = 256


def dense_attention(q: Tensor, kv: PagedKV, batch: StepBatch) -> Tensor:
    """Causal attention of ``q`` [T, Hq, Dk] over all cached tokens of its row: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    tokens = short_tokens(batch)
    if tokens is None:
        return _by_token(q, kv, batch, batch.positions, batch.token_rows)
    out = q.new_zeros(q.shape[0], q.shape[1], kv.v.shape[3])
    if tokens.numel():
        positions, rows = batch.positions[tokens], batch.token_rows[tokens]
        out[tokens] = _by_token(q[tokens], kv, batch, positions, rows)
    for row in long_rows(batch):
        attend_prefix(q, kv, batch, row, out)
    return out


def _by_token(q: Tensor, kv: PagedKV, batch: StepBatch, positions: Tensor, rows: Tensor) -> Tensor:
    num_pages = -(-batch.max_context_len // kv.k.shape[2])
    slots = batch.slot_table[rows.long(), None, :num_pages]  # [t, 1, m]
    pages = torch.arange(slots.shape[2], device=q.device).expand_as(slots)
    return attend_pages(q, kv, pages, slots, positions)


def attend_prefix(q: Tensor, kv: PagedKV, batch: StepBatch, part: QueryTile, out: Tensor) -> None:
    """Causal attention of the tokens of ``part`` over their row's cache, written into ``out``."""
    slots = batch.slot_table[part.row, None, : -(-(part.last + 1) // kv.k.shape[2])]
    k, v = gather_both(kv, slots)
    if part.first == 0:
        keys = slice(0, part.last + 1)
        out[part.tokens] = attend_tile(q[part.tokens], k[:, keys], v[:, keys], None)
        return
    for tile in part.split(_TILE):
        keys = slice(0, tile.last + 1)
        bias = causal_bias(range(tile.first, tile.last + 1), range(tile.last + 1), None, q.device)
        out[tile.tokens] = attend_tile(q[tile.tokens], k[:, keys], v[:, keys], bias)
