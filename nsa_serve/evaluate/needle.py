"""A fact hidden in a long text and asked for: contexts × depths × keys."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..train.phrases import Split
from ..train.tasks import Exercise, needle
from .haystack import Haystack, hidden, num_besides_hay
from .record import Record
from .scoring import holds
from .subject import Advance, Question, Subject, check_context

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
ANSWER_TOKENS = 64
# What joining sentences and facts may add to the sum of their counts.
_SLACK = 16


@dataclass(frozen=True, slots=True)
class NeedleGrid:
    """``contexts`` are tokens of prompt and answer together."""

    text: str
    contexts: tuple[int, ...] = CONTEXTS
    num_depths: int = 11
    num_keys: int = 5
    seed: int = 0

    @property
    def depths(self) -> tuple[float, ...]:
        """From the start of the text, 0, to its end, 1."""
        last = max(self.num_depths - 1, 1)
        return tuple(round(i / last, 4) for i in range(self.num_depths))

    @property
    def num_prompts(self) -> int:
        return len(self.contexts) * self.num_depths * self.num_keys

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def run_needles(
    grid: NeedleGrid, subject: Subject, haystack: Haystack, record: Record, advance: Advance
) -> dict[str, Any]:
    """Ask whatever ``record`` lacks, and give the summary. ``advance`` is told of every prompt."""
    check_context(subject, max(grid.contexts))
    for context in grid.contexts:
        for key in range(grid.num_keys):
            # Deepest first: each prompt shares all that stands before its needle with the last.
            depths = [d for d in reversed(grid.depths) if _name(context, d, key) not in record]
            if depths:
                record.add(_ask(grid, subject, haystack, context, key, depths))
            advance(grid.num_depths)
    return summary(grid, record)


def _ask(
    grid: NeedleGrid,
    subject: Subject,
    haystack: Haystack,
    context: int,
    key: int,
    depths: Sequence[float],
) -> dict[str, dict[str, Any]]:
    rng = random.Random(f"{grid.seed}/{key}")
    exercise = haystack.draw(_numbered, rng)
    room = context - ANSWER_TOKENS - _SLACK - num_besides_hay(subject, exercise)
    hay = haystack.take(room, share=key / grid.num_keys)
    (turn,) = exercise.turns
    questions = [
        Question(hidden(hay, exercise.facts, [depth], turn.question), ANSWER_TOKENS)
        for depth in depths
    ]
    return {
        _name(context, depth, key): {
            "context": context,
            "depth": depth,
            "key": key,
            "prompt_tokens": answer.prompt_tokens,
            "question": turn.question,
            "expected": turn.values[0],
            "answer": answer.text,
            "found": holds(answer.text, turn.values[0]),
        }
        for depth, answer in zip(depths, subject.answer(questions), strict=True)
    }


def _numbered(rng: random.Random) -> Exercise:
    """A needle whose value is a number: it can be guessed from nothing else."""
    while True:
        exercise = needle(rng, Split.HELD_OUT)
        if exercise.turns[0].values[0].isdigit():
            return exercise


def summary(grid: NeedleGrid, record: Record) -> dict[str, Any]:
    """Shares of needles found: of all, by context, and by context and depth."""
    cells = {
        f"{context}/{depth}": _share(
            [record.items[_name(context, depth, key)]["found"] for key in range(grid.num_keys)]
        )
        for context in grid.contexts
        for depth in grid.depths
    }
    return {
        "found": _share([bool(item["found"]) for item in record.items.values()]),
        "by_context": {
            str(c): _share([bool(i["found"]) for i in record.items.values() if i["context"] == c])
            for c in grid.contexts
        },
        "by_cell": cells,
    }


def _share(found: Sequence[bool]) -> float:
    return round(sum(found) / len(found), 4)


def _name(context: int, depth: float, key: int) -> str:
    return f"{context}/{depth}/{key}"
