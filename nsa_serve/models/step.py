"""What one forward pass reads beside the weights: one frozen record, built by the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.shapes import CompressedKV, PagedKV, StepBatch


class Ahead(Protocol):
    """Brings pages that later steps may select to the device, beside the computation of this."""

    def room(self) -> torch.Tensor | None:
        """Where a layer's best blocks [T, Hkv, m] are to be filed, more of them than it selects."""

    def prefetch(self, layer: int, selection: torch.Tensor, ranked: torch.Tensor | None) -> None:
        """The layer has attended to ``selection`` [T, Hkv, n]; ``ranked`` is what ``room`` gave."""

    def finish(self) -> None:
        """All layers have been computed: what comes next comes after the copies."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of a step, where each stands, and every layer's cache.

    ``resident`` is the host tier's hook: given a layer and its selection [T, Hkv, n], it answers
    the device slots of those pages [T, Hkv, n]. None: every page is on the device, and
    ``batch.slot_table`` says where. ``ahead`` fetches for later steps. ``observer`` is told
    each NSA layer's selection [T, Hkv, n] and gate logits [T, Hq, 3], where somebody wants them.
    """

    token_ids: torch.Tensor  # [T] int64; 0 for padding
    batch: StepBatch
    kv: Sequence[PagedKV]  # by layer
    compressed: Sequence[CompressedKV] | None  # by layer; None for a dense model
    logits_index: torch.Tensor  # [R] int64, tokens of the step whose logits are wanted
    resident: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    ahead: Ahead | None = None
    observer: Callable[[int, torch.Tensor, torch.Tensor | None], None] | None = None

    def ensure_resident(self, layer: int, selection: torch.Tensor) -> torch.Tensor | None:
        """Slots of the selection, or None where the slot table serves."""
        return None if self.resident is None else self.resident(layer, selection)

    def room_for_ranked(self) -> torch.Tensor | None:
        """Where the compressed branch is to file its best blocks; None where nobody asks."""
        return None if self.ahead is None else self.ahead.room()

    def prefetch(self, layer: int, selection: torch.Tensor, ranked: torch.Tensor | None) -> None:
        """The layer has attended: what later steps may select may be fetched from now on."""
        if self.ahead is not None:
            self.ahead.prefetch(layer, selection, ranked)

    def finish(self) -> None:
        """All layers have been computed."""
        if self.ahead is not None:
            self.ahead.finish()

    def observe(
        self, layer: int, selection: torch.Tensor, gate_logits: torch.Tensor | None
    ) -> None:
        """Tell the observer, if there is one, what a layer selected and how its gates stand."""
        if self.observer is not None:
            self.observer(layer, selection, gate_logits)
