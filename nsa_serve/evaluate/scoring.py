"""Whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

_COMMA = re.compile(r"(?<=\d),(?=\d{3})")


def holds(answer: str, value: str) -> bool:
    """Whether ``value`` stands in ``answer``, by itself; 1,234 is 1234, case does not count."""
    wanted = re.escape(_folded(value))
    return re.search(rf"(?<!\w){wanted}(?!\w)", _folded(answer)) is not None


def _folded(text: str) -> str:
    return _COMMA.sub("", " ".join(text.split())).casefold()


def score(expected: Sequence[str], answer: str, *, is_copy: bool = False) -> dict[str, Any]:
    """``right``: all that was asked for is there. ``share`` of it; of a copy, how alike it is."""
    found = [holds(answer, value) for value in expected]
    if is_copy and not all(found):
        words = SequenceMatcher(None, expected[0].split(), answer.split(), autojunk=False)
        return {"right": False, "share": round(words.ratio(), 4)}
    return {"right": all(found), "share": round(sum(found) / len(found), 4)}
