"""Token sequences that a request must not say: the last token is forbidden after the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.dispatch import ops_for
from ..schedule.plan import RowStart
from .staging import to_device

_ANY = -1  # stands before a sequence shorter than the longest
_NOTHING = -2  # stands before the first output token


@dataclass(slots=True)
class _Words:
    """One row's sequences [W, L], split after L − 1, and the L − 1 tokens it has said last."""

    heads: torch.Tensor  # [W, L − 1] int64, _ANY in front
    lasts: torch.Tensor  # [W] int64
    tail: torch.Tensor  # [L − 1] int64


class BadWords:
    """Sequences by row. What was said is kept on the device, where a step's token is known first.

    Only a request's output counts: a sequence that the prompt begins may be ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._words: dict[int, _Words] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._words

    def add(self, start: RowStart) -> None:
        """Take up a row's sequences, after what its request has said before."""
        words = start.sampling.bad_words
        before = max(map(len, words)) - 1
        heads = [[_ANY] * (before + 1 - len(word)) + list(word[:-1]) for word in words]
        said = start.output_token_ids[max(0, len(start.output_token_ids) - before) :]
        tail = [_NOTHING] * (before - len(said)) + list(said)
        shaped = np.array(heads, np.int64).reshape(len(words), before)
        self._words[start.row] = _Words(
            heads=to_device(shaped, self.device),
            lasts=to_device(np.array([word[-1] for word in words], np.int64), self.device),
            tail=to_device(np.array(tail, np.int64), self.device),
        )

    def discard(self, row: int) -> None:
        self._words.pop(row, None)

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """``logits`` [B, V] without what would end a sequence; ``rows`` [B] are of the tables."""
        held = [(at, self._words[row]) for at, row in enumerate(rows) if row in self._words]
        counts = [len(words.lasts) for _, words in held]
        where = np.repeat(np.array([at for at, _ in held], np.int64), counts)
        amounts = [torch.where(_matches(words), -torch.inf, 0.0) for _, words in held]
        edited: torch.Tensor = ops_for(self.device).add_bias(
            logits,
            to_device(where, self.device),
            torch.cat([words.lasts for _, words in held]),
            torch.cat(amounts),
        )
        return edited

    def record(self, tokens: torch.Tensor, rows: Sequence[int]) -> None:
        """Note the sampled ``tokens`` [B]."""
        for at, row in enumerate(rows):
            words = self._words.get(row)
            if words is not None and len(words.tail):
                words.tail = torch.cat((words.tail[1:], tokens[at : at + 1]))


def _matches(words: _Words) -> torch.Tensor:
    """[W], whether all but the last token of a sequence were just said."""
    return ((words.heads == words.tail) | (words.heads == _ANY)).all(-1)
