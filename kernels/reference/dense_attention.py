"""Full causal attention over the paged cache."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..shapes import PagedKV, StepBatch
from .paged import QueryTile, check_queries, gather_both, long_rows, short_tokens
from .softmax_attention import PageRead, attend_pages, attend_tile, causal_bias, page_reads

Tensor = torch.Tensor

_TILE = 256


def dense_attention(q: Tensor, kv: PagedKV, batch: StepBatch) -> Tensor:
    """Causal attention of ``q`` [T, Hq, Dk] over all cached tokens of its row: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    tokens, page = short_tokens(batch), kv.k.shape[2]
    if tokens is None:
        return attend_pages(q, kv, _reads(batch, batch.positions, batch.token_rows, page))
    out = q.new_zeros(q.shape[0], q.shape[1], kv.v.shape[3])
    if tokens.numel():
        positions, rows = batch.positions[tokens], batch.token_rows[tokens]
        out[tokens] = attend_pages(q[tokens], kv, _reads(batch, positions, rows, page))
    for row in long_rows(batch):
        attend_prefix(q, kv, batch, row, out)
    return out


@lru_cache(maxsize=1)
def _reads(batch: StepBatch, positions: Tensor, rows: Tensor, page: int) -> tuple[PageRead, ...]:
    """What the tokens read is the same in every layer of a step."""
    num_pages = -(-batch.max_context_len // page)
    slots = batch.slot_table[rows.long(), None, :num_pages]  # [t, 1, m]
    pages = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
    return page_reads(pages, slots, positions, None, page)


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
