"""Attention over the last w tokens (paper, section 3.3.3)."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .paged import QueryTile, check_queries, gather_both, long_rows, short_tokens
from .softmax_attention import PageRead, attend_pages, attend_tile, causal_bias, page_reads

Tensor = torch.Tensor

_TILE = 128


def window_attention(q: Tensor, kv: PagedKV, batch: StepBatch, *, nsa: NSAShape) -> Tensor:
    """Attention of ``q`` [T, Hq, Dk] over tokens max(0, t − w + 1) … t: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", k=kv.k, P=nsa.page)
    tokens = short_tokens(batch)
    if tokens is None:
        return attend_pages(q, kv, _reads(batch, batch.positions, batch.token_rows, nsa))
    out = q.new_zeros(q.shape[0], q.shape[1], kv.v.shape[3])
    if tokens.numel():
        positions, rows = batch.positions[tokens], batch.token_rows[tokens]
        out[tokens] = attend_pages(q[tokens], kv, _reads(batch, positions, rows, nsa))
    for row in long_rows(batch):
        for tile in row.split(_TILE):
            out[tile.tokens] = _tile(q[tile.tokens], kv, batch, tile, nsa)
    return out


@lru_cache(maxsize=1)
def _reads(
    batch: StepBatch, positions: Tensor, rows: Tensor, nsa: NSAShape
) -> tuple[PageRead, ...]:
    """What the tokens read is the same in every layer of a step."""
    first_keys = (positions + 1 - nsa.window).clamp(min=0)
    most = (nsa.window + nsa.page - 2) // nsa.page + 1  # pages that w tokens can touch
    most = min(most, -(-batch.max_context_len // nsa.page))
    pages = (first_keys // nsa.page)[:, None] + torch.arange(most, device=positions.device)
    slots = batch.slot_table[rows.long()[:, None], pages.clamp(max=batch.slot_table.shape[1] - 1)]
    return page_reads(pages[:, None], slots[:, None], positions, first_keys, nsa.page)


def _tile(q: Tensor, kv: PagedKV, batch: StepBatch, tile: QueryTile, nsa: NSAShape) -> Tensor:
    first_page = max(0, tile.first + 1 - nsa.window) // nsa.page
    slots = batch.slot_table[tile.row, None, first_page : tile.last // nsa.page + 1]
    keys = range(first_page * nsa.page, tile.last + 1)
    bias = causal_bias(range(tile.first, tile.last + 1), keys, nsa.window, q.device)
    k, v = gather_both(kv, slots)
    return attend_tile(q, k[:, : len(keys)], v[:, : len(keys)], bias)
