"""From attention over compressed entries to the blocks each token reads (paper, equations 8-12)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..contracts import check
from ..shapes import NSAShape, StepBatch

Tensor = torch.Tensor

_NEVER = torch.iinfo(torch.int64).min
_ALWAYS = torch.iinfo(torch.int64).max


def block_scores(p: Tensor, *, nsa: NSAShape, num_kv_heads: int) -> Tensor:
    """Importance of each block from ``p`` [T, Hq, C], softmax over entries: [T, Hkv, NB] fp32.

    Summed over the G heads of a group; each entry's share counts once per stride of d tokens that
    it has in the block. NB covers every token that sees at most C entries.
    """
    check(p.ndim == 3 and p.shape[1] % num_kv_heads == 0, "Hq is no multiple of Hkv", p=p)
    grouped = torch.unflatten(p.float(), 1, (num_kv_heads, -1)).sum(2)
    return spread_over_blocks(grouped, nsa)


def spread_over_blocks(mass: Tensor, nsa: NSAShape) -> Tensor:
    """Scores [..., NB] of blocks from the share [..., C] of each entry, weighted by overlap."""
    per_page, overlap = nsa.entries_per_page, nsa.overlap
    last_token = mass.shape[-1] * nsa.compress_stride + nsa.compress_len - 2
    blocks = max(1, last_token // nsa.page + 1)
    # Block j takes entries j·P/d − (l/d − 1) … (j + 1)·P/d − 1.
    taken = per_page + overlap - 1
    right = blocks * per_page - mass.shape[-1]
    near = F.pad(mass, (overlap - 1, right)).unfold(-1, taken, per_page)  # [..., NB, taken]
    weights = [min(i + 1, overlap, per_page, taken - i) for i in range(taken)]
    # A product and a sum, not a matrix product: equal shares then give scores equal bit for bit
    # wherever the block stands, so that ties are ties.
    return (near * torch.tensor(weights, dtype=torch.float32, device=mass.device)).sum(-1)


def select_blocks(scores: Tensor, positions: Tensor, *, nsa: NSAShape) -> Tensor:
    """The n blocks of each token and KV head: [T, Hkv, n] int32, ascending, padded with −1.

    ``scores`` [T, Hkv, NB] fp32, ``positions`` [T]. Blocks 0 … t//P are candidates. The first
    ``num_initial`` and the last ``num_local`` of them are always taken, then those of higher
    score, and of equal ones the smaller index.
    """
    check(scores.ndim == 3 and scores.dtype == torch.float32, "scores are not fp32", scores=scores)
    check(scores.shape[0] == positions.shape[0], "scores and positions differ", scores=scores)
    blocks = scores.shape[-1]
    keys = _ranking(scores, positions // nsa.page, nsa)
    best, chosen = keys.topk(min(nsa.num_selected, blocks), dim=-1)
    chosen = chosen.masked_fill_(best == _NEVER, blocks).sort(dim=-1).values
    chosen = F.pad(chosen, (0, nsa.num_selected - chosen.shape[-1]), value=blocks)
    return chosen.masked_fill_(chosen == blocks, -1).int()


def select_for_one(scores: Tensor, position: int, nsa: NSAShape) -> Tensor:
    """``select_blocks`` for one token at ``position``, scores [Hkv, NB] -> [Hkv, n].

    A stable sort of one short row takes a third of the time of building keys for it.
    """
    candidates = position // nsa.page + 1
    scores = scores[:, :candidates].clone()
    scores[:, : nsa.num_initial] = torch.inf
    scores[:, candidates - nsa.num_local :] = torch.inf
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, : nsa.num_selected].sort(dim=-1).values.int()
    lacking = nsa.num_selected - chosen.shape[1]
    return F.pad(chosen, (0, lacking), value=-1) if lacking else chosen


def every_block(batch: StepBatch, num_kv_heads: int, nsa: NSAShape) -> Tensor:
    """Blocks 0 … t//P of each token, cut at n: [T, Hkv, n] int32, one tensor for all layers."""
    key = ("every block", num_kv_heads, nsa)
    return batch.once(key, lambda: first_blocks(batch.positions, num_kv_heads, nsa))


def first_blocks(positions: Tensor, num_kv_heads: int, nsa: NSAShape) -> Tensor:
    """Blocks 0 … t//P of each token at ``positions`` [T], cut at n: [T, Hkv, n] int32."""
    blocks = torch.arange(nsa.num_selected, device=positions.device, dtype=torch.int32)
    beyond = blocks > (positions // nsa.page)[:, None]
    return blocks.where(~beyond, -1)[:, None].repeat(1, num_kv_heads, 1)


def _ranking(scores: Tensor, current: Tensor, nsa: NSAShape) -> Tensor:
    """int64 keys [T, Hkv, NB], all different among candidates, whose order is the selection's."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes −0 and 0 equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers, in the floats' order
    block = torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered.long() << 32) + (scores.shape[-1] - block)
    current = current[:, None]
    forced = (block < nsa.num_initial) | (block > current - nsa.num_local)
    keys.masked_fill_(forced[:, None], _ALWAYS)
    return keys.masked_fill_((block > current)[:, None], _NEVER)
