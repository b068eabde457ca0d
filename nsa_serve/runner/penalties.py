"""What penalised requests have said: token counts on the device, only for rows that need them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels.dispatch import ops_for
from ..request import SamplingParams
from ..schedule.plan import RowStart
from .staging import to_device


def is_penalised(sampling: SamplingParams) -> bool:
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
    )


class PenaltyCounts:
    """Counts of sampled tokens and marks of prompt tokens, [slots, V], grown by doubling.

    A penalised row holds one slot from its start until it is discarded.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._output_counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []
        self._slots: dict[int, int] = {}  # by row
        self._weights: dict[int, tuple[float, float, float]] = {}  # by row

    def __contains__(self, row: int) -> bool:
        return row in self._slots

    def add(self, start: RowStart) -> None:
        """Take a slot for a row, counting what its request has said before."""
        if not self._free:
            self._grow()
        slot = self._slots[start.row] = self._free.pop()
        s = start.sampling
        self._weights[start.row] = (s.presence_penalty, s.frequency_penalty, s.repetition_penalty)
        prompt, output = (
            to_device(np.array(ids, np.int64), self.device)
            for ids in (start.prompt_token_ids, start.output_token_ids)
        )
        self._in_prompt[slot].zero_().index_fill_(0, prompt, True)
        ones = torch.ones_like(output, dtype=torch.int32)
        self._output_counts[slot].zero_().index_add_(0, output, ones)

    def discard(self, row: int) -> None:
        """Give a row's slot back, if it holds one."""
        if row in self._slots:
            self._free.append(self._slots.pop(row))
            del self._weights[row]

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Penalised logits [B, V], as a new tensor; ``rows`` [B] are rows of the tables."""
        picks, slots = self._pick(rows)
        weights = np.array([self._weights[row] for row in rows if row in self._slots], np.float32)
        presence, frequency, repetition = to_device(weights.T.copy(), self.device)
        penalised = ops_for(self.device).apply_penalties(
            logits[picks],
            self._output_counts[slots],
            self._in_prompt[slots],
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )
        return logits.index_copy(0, picks, penalised)

    def record(self, tokens: torch.Tensor, rows: Sequence[int]) -> None:
        """Count the sampled ``tokens`` [B] of penalised rows."""
        picks, slots = self._pick(rows)
        cells = slots * self._output_counts.shape[1] + tokens[picks]
        ones = torch.ones_like(cells, dtype=torch.int32)
        self._output_counts.view(-1).index_add_(0, cells, ones)

    def _pick(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in ``rows`` the penalised ones are, and their slots."""
        pairs = [(at, self._slots[row]) for at, row in enumerate(rows) if row in self._slots]
        picks, slots = to_device(np.array(pairs, np.int64).T.copy(), self.device)
        return picks, slots

    def _grow(self) -> None:
        held = len(self._output_counts)
        added = max(held, 1)
        self._output_counts = _extend(self._output_counts, added)
        self._in_prompt = _extend(self._in_prompt, added)
        self._free.extend(range(held, held + added))


def _extend(table: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((table, table.new_zeros(rows, table.shape[1])))
