"""Cleaning of documents: folded whitespace, no scraps, no paragraph twice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

_SHORTEST = 400  # characters of a document
_COMPARED = 160  # characters from which a paragraph counts as repeated
_SPACES = re.compile(r"[ \t\u00a0]+")
_BLANKS = re.compile(r"\n{3,}")


class Deduplicator:
    """Remembers every longer paragraph that it has let through."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.num_dropped = 0

    def unseen(self, text: str) -> str:
        """``text`` without the paragraphs that came before, in this text or another."""
        return "\n\n".join(p for p in text.split("\n\n") if self._is_new(p))

    def _is_new(self, paragraph: str) -> bool:
        folded = " ".join(paragraph.split()).lower()
        if len(folded) < _COMPARED:
            return True
        digest = hashlib.blake2b(folded.encode(), digest_size=12).digest()
        if digest in self._seen:
            self.num_dropped += 1
            return False
        self._seen.add(digest)
        return True


def cleaned(documents: Iterable[str], seen: Deduplicator) -> Iterator[str]:
    """Documents worth training on."""
    for text in documents:
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
        text = _SPACES.sub(" ", text)
        text = "\n".join(line.strip() for line in text.split("\n"))
        text = _BLANKS.sub("\n\n", seen.unseen(text)).strip()
        if len(text) >= _SHORTEST:
            yield text
