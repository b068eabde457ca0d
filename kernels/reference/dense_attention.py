"""Full causal attention over the paged cache."""

from __future__ import annotations

import torch

from ..shapes import PagedKV, StepBatch
from .paged import QueryTile, check_queries, gather_both, long_rows
from .softmax_attention import attend_tile, causal_bias
from .token_groups import attend_runs, token_groups

Tensor = torch.Tensor

_TILE = 256


def dense_attention(q: Tensor, kv: PagedKV, batch: StepBatch) -> Tensor:
    """Causal attention of ``q`` [T, Hq, Dk] over all cached tokens of its row: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0.
    """
    check_queries(q, kv, batch)
    out = attend_runs(q, kv, batch, token_groups(batch, kv.k.shape[2], kv.k.dtype))
    for row in long_rows(batch):
        attend_prefix(q, kv, batch, row, out)
    return out


def attend_prefix(q: Tensor, kv: PagedKV, batch: StepBatch, part: QueryTile, out: Tensor) -> None:
    """Causal attention of the tokens of ``part`` over their row's cache, written into ``out``."""
    slots = batch.slot_table[part.row, None, : -(-(part.last + 1) // kv.k.shape[2])]
    k, v = gather_both(kv, slots)
    if part.first == 0 and q.device.type == "cpu":
        keys = slice(0, part.last + 1)
        out[part.tokens] = attend_tile(q[part.tokens], k[:, keys], v[:, keys], None)
        return
    for tile in part.split(_TILE):
        keys = slice(0, tile.last + 1)
        bias = causal_bias(range(tile.first, tile.last + 1), range(tile.last + 1), None, q.device)
        out[tile.tokens] = attend_tile(q[tile.tokens], k[:, keys], v[:, keys], bias)
