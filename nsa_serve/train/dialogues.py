"""Dialogues on disk, and micro-batches of them: each a sequence of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, ConfigError
from .corpus import END_OF_TEXT, Tokens
from .sequences import PADDING, SPOKEN, UNUSED, TrainingSequence


@dataclass(frozen=True, slots=True)
class Dialogues:
    """Dialogue i is ``tokens[offsets[i] : offsets[i + 1]]``; ``spoken`` are the base's answers."""

    tokens: Tokens  # [T] uint16
    spoken: NDArray[np.bool_]  # [T]
    offsets: NDArray[np.int64]  # [N + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Tokens, NDArray[np.bool_]]:
        """Tokens of one dialogue, and which of them the base said."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.spoken[span]

    def draw(self, rng: random.Random) -> TrainingSequence:
        """One of them by chance."""
        tokens, spoken = self[rng.randrange(len(self))]
        return TrainingSequence(tokens, np.where(spoken, SPOKEN, UNUSED).astype(np.int8))

    @classmethod
    def of(cls, parts: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Dialogues:
        """Raises ``ConfigError`` for ids that do not fit into 16 bits."""
        ids = [token for tokens, _ in parts for token in tokens]
        if ids and max(ids) > np.iinfo(np.uint16).max:
            raise ConfigError(f"token {max(ids)}: dialogues hold vocabularies of up to 65,536")
        spoken = [said for _, kinds in parts for said in kinds]
        offsets = [0, *accumulate(len(tokens) for tokens, _ in parts)]
        return cls(
            np.array(ids, np.uint16), np.array(spoken, np.bool_), np.array(offsets, np.int64)
        )

    def save(self, path: Path) -> None:
        """Write what ``open`` reads: a compressed .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, tokens=self.tokens, spoken=self.spoken, offsets=self.offsets)

    @classmethod
    def open(cls, path: Path) -> Dialogues:
        """Raises ``CheckpointError`` for what holds no dialogues."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                found = cls(file["tokens"], file["spoken"], file["offsets"])
        except (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile) as error:
            raise CheckpointError(f"{path}: no dialogues there: {error}") from error
        sizes = {len(found.tokens), len(found.spoken), int(found.offsets[-1])}
        if len(found) == 0 or len(sizes) > 1 or np.any(np.diff(found.offsets) <= 0):
            raise CheckpointError(f"{path}: its dialogues are empty or do not add up")
        return found


def draw_to_length(
    rng: random.Random, draw: Callable[[random.Random], TrainingSequence], total: int, page: int
) -> list[TrainingSequence]:
    """What ``draw`` draws, each padded to whole pages, ``total`` tokens together.

    The last one is cut where ``total`` is reached: what the base thinks of the tokens before
    does not depend on those after. ``total`` is a multiple of ``page``.
    """
    found, left = [], total
    while left > 0:
        found.append(_padded(draw(rng), left, page))
        left -= len(found[-1].tokens)
    return found


def _padded(sequence: TrainingSequence, limit: int, page: int) -> TrainingSequence:
    tokens, kinds = sequence.tokens[:limit], sequence.kinds[:limit]
    missing = -len(tokens) % page
    return TrainingSequence(
        np.pad(tokens, (0, missing), constant_values=END_OF_TEXT),
        np.pad(kinds, (0, missing), constant_values=PADDING),
    )
