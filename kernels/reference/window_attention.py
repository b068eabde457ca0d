"""Attention over the last w tokens (paper, section 3.3.3)."""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .paged import QueryTile, check_queries, gather_both, long_rows
from .softmax_attention import attend_tile, causal_bias
from .token_groups import attend_runs, token_groups

Tensor = torch.Tensor

_TILE = 128


def window_attention(q: Tensor, kv: PagedKV, batch: StepBatch, *, nsa: NSAShape) -> Tensor:
    """Attention of ``q`` [T, Hq, Dk] over tokens max(0, t − w + 1) … t: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", k=kv.k, P=nsa.page)
    groups = token_groups(batch, nsa.page, kv.k.dtype, window=nsa.window)
    out = attend_runs(q, kv, batch, groups)
    for row in long_rows(batch):
        for tile in row.split(_TILE):
            out[tile.tokens] = _tile(q[tile.tokens], kv, batch, tile, nsa)
    return out


def _tile(q: Tensor, kv: PagedKV, batch: StepBatch, tile: QueryTile, nsa: NSAShape) -> Tensor:
    first_page = max(0, tile.first + 1 - nsa.window) // nsa.page
    slots = batch.slot_table[tile.row, None, first_page : tile.last // nsa.page + 1]
    keys = range(first_page * nsa.page, tile.last + 1)
    bias = causal_bias(range(tile.first, tile.last + 1), keys, nsa.window, q.device)
    k, v = gather_both(kv, slots)
    return attend_tile(q, k[:, : len(keys)], v[:, : len(keys)], bias)
