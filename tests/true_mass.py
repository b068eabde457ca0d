"""A selection no server has: blocks ranked by the attention mass they truly receive.

It reads every key, so it is of no use but to show that the cache and the sparse attention lose
nothing when the blocks are chosen well.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import torch

from nsa_serve.kernels import reference
from nsa_serve.kernels.shapes import CompressedKV, NSAShape, PagedKV, StepBatch

Tensor = torch.Tensor
_TILE = 128  # queries whose scores over the whole context are held at once


class TrueMassOps:
    """The ops of a layer, save that ``compressed_attention`` selects by the true mass.

    One layer's own: it remembers the pages that ``kv_write`` was given.
    """

    def __init__(self, ops: ModuleType) -> None:
        self._ops = ops
        self._kv: PagedKV | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def kv_write(self, k: Tensor, v: Tensor, kv: PagedKV, *args: Any, **kwargs: Any) -> None:
        self._kv = kv
        self._ops.kv_write(k, v, kv, *args, **kwargs)

    def compressed_attention(
        self, q: Tensor, compressed: CompressedKV, batch: StepBatch, *, nsa: NSAShape,
        with_output: bool = True, ranked: Tensor | None = None,
    ) -> tuple[None, Tensor]:  # fmt: skip
        assert not with_output, "for fixed gates only"
        assert ranked is None, "without a host tier only"
        bounds = batch.cu_seqlens_q.tolist()
        chosen = [
            self._select(q[at : min(at + _TILE, stop)], row, at, batch, nsa)
            for row, (start, stop) in enumerate(itertools.pairwise(bounds))
            for at in range(start, stop, _TILE)
        ]
        return None, torch.cat(chosen)

    def _select(self, q: Tensor, row: int, at: int, batch: StepBatch, nsa: NSAShape) -> Tensor:
        """The selection [t, Hkv, n] of one tile's queries ``q`` [t, Hq, D] from token ``at`` on."""
        assert self._kv is not None
        positions = batch.positions[at : at + len(q)]
        pages = int(positions[-1]) // nsa.page + 1
        keys = self._kv.k[batch.slot_table[row, :pages].long()]  # [pages, Hkv, P, D]
        heads = keys.shape[1]
        keys = keys.transpose(0, 1).flatten(1, 2).float()  # [Hkv, pages·P, D]
        # Beyond the last token a page holds what it held before.
        future = torch.arange(keys.shape[1], device=q.device) > positions[:, None]
        keys = keys.masked_fill(future[-1][None, :, None], 0.0)
        grouped = q.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
        scores = grouped @ keys.transpose(1, 2)[:, None] / q.shape[-1] ** 0.5
        mass = scores.masked_fill(future, -torch.inf).softmax(-1).sum(1)  # [Hkv, t, pages·P]
        by_block = mass.unflatten(-1, (pages, nsa.page)).sum(-1).transpose(0, 1).contiguous()
        return reference.select_blocks(by_block, positions, nsa=nsa)
