"""Full causal attention over the paged cache."""

from __future__ import annotations

import torch

from ..shapes import PagedKV, StepBatch
from .paged import (
    QueryTile,
    attend_pages,
    attend_tile,
    check_queries,
    gather_pieces,
    query_tiles,
    short_tokens,
)

Tensor = torch.Tensor

_TILE = 512


def dense_attention(q: Tensor, kv: PagedKV, batch: StepBatch) -> Tensor:
    """Causal attention of ``q`` [T, Hq, Dk] over all cached tokens of its row: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    out = q.new_zeros(q.shape[0], q.shape[1], kv.v.shape[3])
    tokens = short_tokens(batch)
    if tokens is None:
        return _by_token(q, kv, batch, batch.positions, batch.token_rows)
    if tokens.numel():
        out[tokens] = _by_token(
            q[tokens], kv, batch, batch.positions[tokens], batch.token_rows[tokens]
        )
    for tile in query_tiles(batch, _TILE):
        out[tile.start : tile.stop] = attend_prefix(q, kv, batch, tile)
    return out


def _by_token(q: Tensor, kv: PagedKV, batch: StepBatch, positions: Tensor, rows: Tensor) -> Tensor:
    num_pages = -(-batch.max_context_len // kv.k.shape[2])
    slots = batch.slot_table[rows.long(), None, :num_pages]  # [t, 1, m]
    pages = torch.arange(slots.shape[2], device=q.device).expand_as(slots)
    return attend_pages(q, kv, pages, slots, positions)


def attend_prefix(q: Tensor, kv: PagedKV, batch: StepBatch, tile: QueryTile) -> Tensor:
    """Causal attention of one tile of ``q`` over all tokens of its row up to each: [t, Hq, Dv]."""
    length = tile.last + 1
    slots = batch.slot_table[tile.row, None, : -(-length // kv.k.shape[2])]
    k = gather_pieces(kv.k, slots)[:, :length]
    v = gather_pieces(kv.v, slots)[:, :length]
    return attend_tile(q[tile.start : tile.stop], k, v, None)
