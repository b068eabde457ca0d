"""The importance loss: blocks that attention over every key would read should score highest.

The score of a block comes from pooled keys, and top-n passes no gradient to them. So for some
tokens of a batch the full attention is computed, and the share that each block receives of it is
what the block scores are pulled towards. It needs no teacher, and costs a few rows of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..kernels.reference.select_blocks import spread_over_blocks
from ..kernels.shapes import NSAShape
from ..kernels.training.compress import products

Tensor = torch.Tensor
_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens of one packed sequence whose block scores are trained."""

    start: int  # the sequence's first token in the batch
    length: int
    positions: Tensor  # [S] int64, in the sequence, each beyond n·P


class ImportanceLoss:
    """Sums over layers and probes. One object for one forward pass."""

    def __init__(self, probes: Sequence[Probe], nsa: NSAShape) -> None:
        self.probes = probes
        self.nsa = nsa
        self.losses: list[Tensor] = []
        self.caught: list[Tensor] = []

    def add(self, q: Tensor, k: Tensor, k_entries: Tensor) -> None:
        """Take one layer's ``q`` [T, Hq, D] and ``k`` [T, Hkv, D], rotated, and φ of its keys.

        ``k_entries`` [T/d, Hkv, D] are as ``compress_packed`` gives them.
        """
        # Taken together, so that there is one gradient of the size of q and not one for each.
        asked = q[torch.cat([probe.start + probe.positions for probe in self.probes])]
        pieces = torch.split(asked, [len(probe.positions) for probe in self.probes])
        for probe, piece in zip(self.probes, pieces, strict=True):
            loss, caught = probe_loss(piece, k, k_entries, probe, self.nsa)
            self.losses.append(loss)
            self.caught.append(caught)

    def total(self) -> Tensor:
        """Mean over layers and probes."""
        return torch.stack(self.losses).mean()

    def caught_share(self) -> Tensor:
        """Mean share, of the attention beyond forced blocks, in the blocks that are selected."""
        return torch.stack(self.caught).mean()


def probe_loss(
    asked: Tensor, k: Tensor, k_entries: Tensor, probe: Probe, nsa: NSAShape
) -> tuple[Tensor, Tensor]:
    """KL from the true shares of blocks to those of their scores, beyond the forced blocks.

    ``asked`` [S, Hq, D] are the queries of the probe's tokens; the rest is the whole batch's.

    Each token and KV head counts by the share of attention that it has beyond the forced blocks.
    Also returns the share of that which lies in the blocks of highest score, without gradient.
    """
    grouped = torch.unflatten(asked, 1, (k.shape[1], -1))
    # Scaled here, where they are few, and not where there is one for each key.
    queries = grouped.permute(1, 2, 0, 3) * asked.shape[-1] ** -0.5  # [Hkv, G, S, D]
    stop = probe.start + probe.length
    keys = k[probe.start : stop].transpose(0, 1)  # [Hkv, L, D]
    slots = slice(probe.start // nsa.compress_stride, stop // nsa.compress_stride)
    entries = k_entries[slots].transpose(0, 1)  # [Hkv, L/d, D]
    free = _free_blocks(probe, nsa)  # [S, NB]
    with torch.no_grad():
        mass = _block_mass(queries, keys, probe.positions, nsa)[..., : free.shape[1]] * free
    scores = _block_scores(queries, entries, probe.positions, nsa)
    scores = F.pad(scores, (0, free.shape[1] - scores.shape[-1])) * free
    beyond = mass.sum(-1, keepdim=True)
    wanted = mass / (beyond + _TINY)
    given = (scores + _TINY).log() - (scores.sum(-1, keepdim=True) + _TINY).log()
    divergence = (wanted * ((wanted + _TINY).log() - given)).sum(-1)
    return (divergence * beyond[..., 0]).mean(), _caught(mass, scores.detach(), nsa)


def _free_blocks(probe: Probe, nsa: NSAShape) -> Tensor:
    """[S, NB]: blocks that are candidates, but not always selected."""
    block = torch.arange(-(-probe.length // nsa.page), device=probe.positions.device)
    local = block > (probe.positions // nsa.page)[:, None] - nsa.num_local
    return ~local & (block >= nsa.num_initial)


def _block_mass(queries: Tensor, keys: Tensor, positions: Tensor, nsa: NSAShape) -> Tensor:
    """Share of full causal attention in each block, mean over the group: [Hkv, S, NB]."""
    scores = _scores(queries, keys)
    future = torch.arange(keys.shape[1], device=keys.device) > positions[:, None]
    p = scores.masked_fill_(future, -torch.inf).softmax(-1)  # [Hkv, G, S, L]
    return torch.unflatten(p, -1, (-1, nsa.page)).sum(-1).mean(1)


def _block_scores(queries: Tensor, entries: Tensor, positions: Tensor, nsa: NSAShape) -> Tensor:
    """Scores [Hkv, S, NB] of blocks from compressed keys, as the selection computes them."""
    # The slots before the first entry stay in the products, whose rows are then aligned.
    scores, lead = _scores(queries, entries), nsa.overlap - 1
    slots = torch.arange(entries.shape[1], device=entries.device)
    hidden = ((slots + 1) * nsa.compress_stride > positions[:, None] + 1) | (slots < lead)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    return spread_over_blocks(p[..., lead:], nsa)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products [Hkv, G, S, L] fp32 of ``queries`` [Hkv, G, S, D] and ``keys`` [Hkv, L, D]."""
    scores = products(queries.flatten(1, 2), keys.transpose(1, 2))
    return torch.unflatten(scores, 1, queries.shape[1:3])


def _caught(mass: Tensor, scores: Tensor, nsa: NSAShape) -> Tensor:
    count = min(nsa.num_selected - nsa.num_initial - nsa.num_local, scores.shape[-1])
    best = scores.topk(count, dim=-1).indices
    return mass.gather(-1, best).sum() / (mass.sum() + _TINY)
