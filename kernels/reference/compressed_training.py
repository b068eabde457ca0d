"""The compressed branch with gradients: whole packed sequences, entries by packed slot.

Scores are held for a tile of queries at a time; the backward pass computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..contracts import check
from ..shapes import NSAShape, StepBatch
from .select_blocks import first_blocks, select_blocks, spread_over_blocks

Tensor = torch.Tensor

# Scores of one tile, at most.
_SCORE_BUDGET = 1 << 20


@dataclass(frozen=True, slots=True)
class _Tile:
    """Neighbouring tokens of one sequence, all of which see an entry, and the entries they see."""

    tokens: slice
    slots: slice
    hidden: Tensor  # [t, c], of each token


def compressed_with_lse(
    q: Tensor, k_entries: Tensor, v_entries: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, Hq, Dv], log2 of the sum of exponentials [T, Hq], and selection [T, Hkv, n].

    ``q`` [T, Hq, Dk] of whole sequences that start at page borders; ``k_entries`` [T/d, Hkv, Dk]
    and ``v_entries`` [T/d, Hkv, Dv] by packed slot: slot s ends with token (s + 1)·d − 1, and the
    first l/d − 1 of a sequence are never read. Tokens that see no entry get 0 for both.
    """
    _check(q, k_entries, v_entries, nsa)
    out = q.new_zeros(*q.shape[:2], v_entries.shape[2])
    lse = torch.zeros(q.shape[:2], dtype=wide_type(q), device=q.device)
    selection = first_blocks(batch.positions, k_entries.shape[1], nsa)
    for tile in _tiles(batch, q.shape[1], nsa):
        k, v = k_entries[tile.slots], v_entries[tile.slots]
        scores = _scores(q[tile.tokens], k, tile)
        sums = scores.logsumexp(-1)
        p = (scores - sums[..., None]).exp()
        out[tile.tokens] = _by_token(p @ _by_head(v)[:, None]).to(out.dtype)
        lse[tile.tokens] = _by_token(sums[..., None])[..., 0] / math.log(2)
        positions = batch.positions[tile.tokens]
        importance = spread_over_blocks(p.sum(1).transpose(0, 1).float(), nsa)
        selection[tile.tokens] = select_blocks(importance, positions, nsa=nsa)
    return out, lse, selection


def compressed_backward(
    q: Tensor,
    k_entries: Tensor,
    v_entries: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q`` and of the entries, in their types; 0 at slots that are no entries.

    ``out`` and ``lse`` are ``compressed_with_lse``'s, ``d_out`` [T, Hq, Dv] the output's gradient.
    """
    _check(q, k_entries, v_entries, nsa)
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide_type(x)) for x in (k_entries, v_entries))
    num_kv_heads, scale = k_entries.shape[1], q.shape[2] ** -0.5
    for tile in _tiles(batch, q.shape[1], nsa):
        queries, keys = _grouped(q[tile.tokens], num_kv_heads), k_entries[tile.slots]
        d_part = _grouped(d_out[tile.tokens], num_kv_heads)  # [Hkv, G, t, Dv]
        delta = (d_part * _grouped(out[tile.tokens], num_kv_heads)).sum(-1, keepdim=True)
        sums = _grouped(lse[tile.tokens][..., None], num_kv_heads) * math.log(2)
        p = (_scores(q[tile.tokens], keys, tile) - sums).exp()
        values = _by_head(v_entries[tile.slots])[:, None]
        ds = p * (d_part @ values.mT - delta) * scale
        dq[tile.tokens] = _by_token(ds @ _by_head(keys)[:, None]).to(dq.dtype)
        dk[tile.slots] += (ds.flatten(1, 2).mT @ queries.flatten(1, 2)).transpose(0, 1)
        dv[tile.slots] += (p.flatten(1, 2).mT @ d_part.flatten(1, 2)).transpose(0, 1)
    return dq, dk.to(k_entries.dtype), dv.to(v_entries.dtype)


def wide_type(x: Tensor) -> torch.dtype:
    """The type of sums over numbers like ``x``'s: fp32, for fp64 itself."""
    return torch.promote_types(x.dtype, torch.float32)


def _check(q: Tensor, k_entries: Tensor, v_entries: Tensor, nsa: NSAShape) -> None:
    check(k_entries.shape[:2] == v_entries.shape[:2], "k and v differ", k=k_entries, v=v_entries)
    check(q.shape[2] == k_entries.shape[2], "q and keys differ in Dk", q=q, k=k_entries)
    check(q.shape[1] % k_entries.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=k_entries)
    slots = q.shape[0] // nsa.compress_stride
    check(k_entries.shape[0] == slots, "entries are not one per d tokens", q=q, k=k_entries)


def _tiles(batch: StepBatch, num_heads: int, nsa: NSAShape) -> Iterator[_Tile]:
    borders = batch.cu_seqlens_q.tolist()
    for start, stop in pairwise(borders):
        entries = nsa.num_visible(stop - start - 1)
        size = max(1, _SCORE_BUDGET // max(1, num_heads * entries))
        slot = start // nsa.compress_stride + nsa.overlap - 1
        for first in range(start + nsa.compress_len - 1, stop, size):
            tokens = slice(first, min(first + size, stop))
            seen = nsa.num_visible(tokens.stop - start - 1)
            ends = torch.arange(seen, device=batch.positions.device) * nsa.compress_stride
            hidden = ends + nsa.compress_len - 1 > batch.positions[tokens, None]
            yield _Tile(tokens, slice(slot, slot + seen), hidden)


def _scores(q: Tensor, k: Tensor, tile: _Tile) -> Tensor:
    """Scaled scores [Hkv, G, t, c] of ``q`` [t, Hq, Dk] over ``k`` [c, Hkv, Dk], −inf if hidden."""
    scores: Tensor = _grouped(q, k.shape[1]) @ _by_head(k)[:, None].mT * q.shape[2] ** -0.5
    return scores.masked_fill_(tile.hidden, -torch.inf)


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[t, Hq, D] -> [Hkv, G, t, D], in the type of sums."""
    return torch.unflatten(x.to(wide_type(x)), 1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """[Hkv, G, t, D] -> [t, Hq, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """Entries [c, Hkv, D] -> [Hkv, c, D], in the type of sums."""
    return x.to(wide_type(x)).transpose(0, 1)
