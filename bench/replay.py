"""Selections with a set overlap from step to step, in place of those that random weights make.

Random weights select at random, which no trained model does. Where pages lie in host memory, the
time of a step depends on how many of its choices were chosen lately.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.shapes import StepBatch
from ..models.attention_nsa import NSAAttention
from ..models.decoder import Decoder

Tensor = torch.Tensor


class SelectionReplay:
    """Replaces the selections of a model's pure decode steps; their computation stays.

    Each of a token's free choices is kept from the step before with probability ``keep``, else
    drawn anew from its share of the far pages. So are ``num_ahead`` runners-up of each, which stay
    runners-up. All state is on the device and changes there alone, so that a CUDA graph may hold
    it, and ``keep`` may be changed between replays.
    """

    def __init__(self, model: Decoder, *, max_rows: int, num_ahead: int = 0) -> None:
        nsa = model.config.nsa
        assert nsa is not None, "dense attention selects nothing"
        self.nsa = nsa.shape
        self.num_free = self.nsa.num_selected - self.nsa.num_initial - self.nsa.num_local
        self.keep = torch.ones(1, device=model.device)
        size = (len(model.layers), max_rows, model.config.num_kv_heads)
        int32 = {"dtype": torch.int32, "device": model.device}
        self._chosen = torch.full((*size, self.num_free + num_ahead), -1, **int32)  # type: ignore[call-overload]
        self._lists = torch.full((*size, self.nsa.num_selected), -1, **int32)  # type: ignore[call-overload]
        for index, layer in enumerate(model.layers):
            assert isinstance(layer.attention, NSAAttention)
            replayed: Any = _ReplayedOps(layer.attention.ops, self, index)
            layer.attention.ops = replayed

    def selection(self, layer: int, batch: StepBatch, selected: Tensor) -> Tensor:
        """What is read instead of ``selected`` [T, Hkv, n]."""
        if batch.max_query_len > 1:
            return selected
        if layer == 0:
            self._advance(batch)
        listed: Tensor = self._lists[layer, : batch.num_tokens]
        return listed

    def ranked(self, layer: int, batch: StepBatch) -> Tensor:
        """[T, Hkv, n + num_ahead] blocks: what ``selection`` gave for this step, and runners-up."""
        T = batch.num_tokens
        ahead = self._chosen[layer, :T, :, self.num_free :]
        is_far = ahead <= batch.positions[:, None, None] // self.nsa.page - self.nsa.num_local
        return torch.cat((self._lists[layer, :T], torch.where(is_far, ahead, -1)), -1)

    def _advance(self, batch: StepBatch) -> None:
        nsa, T = self.nsa, batch.num_tokens
        chosen = self._chosen[:, :T]
        current = (batch.positions // nsa.page)[:, None, None]  # [T, 1, 1]
        first, last = nsa.num_initial, current - nsa.num_local
        # A share of the far pages for each choice: then no page is drawn twice.
        num_choices = chosen.shape[-1]
        width = (last - first + 1).clamp(min=num_choices) / num_choices
        part = torch.arange(num_choices, device=chosen.device)
        draws = first + ((part + torch.rand(chosen.shape, device=chosen.device)) * width).int()
        kept = torch.rand(chosen.shape, device=chosen.device) < self.keep
        kept &= (chosen >= 0) & (chosen <= last)
        chosen.copy_(torch.where(kept, chosen, draws))
        place = torch.arange(nsa.num_selected, device=chosen.device)
        initial, local = place[: nsa.num_initial], place[: nsa.num_local]
        shape = (*chosen.shape[:-1], -1)
        far = [
            initial.expand(shape),
            chosen[..., : self.num_free].sort(dim=-1).values,
            (last + 1 + local).expand(shape),
        ]
        every = torch.where(place <= current, place, -1)
        short = current < nsa.num_selected
        self._lists[:, :T] = torch.where(short, every, torch.cat(far, dim=-1))


class _ReplayedOps:
    """A device's ops, but for what selects."""

    def __init__(self, ops: Any, replay: SelectionReplay, layer: int) -> None:
        self._ops = ops
        self._replay = replay
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def compressed_attention(
        self,
        q: Tensor,
        compressed: Any,
        batch: StepBatch,
        *,
        ranked: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        out, selected = self._ops.compressed_attention(
            q, compressed, batch, ranked=ranked, **options
        )
        selection = self._replay.selection(self._layer, batch, selected)
        if ranked is not None and selection is not selected:
            ranked.copy_(self._replay.ranked(self._layer, batch))
        return out, selection
