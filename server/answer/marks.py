"""Marks such as <tool_call> in text that comes in pieces."""

from __future__ import annotations

from ...engine.stops import overlap

SPACE = " \t\r\n"


def split_at(mark: str, text: str) -> tuple[str, str, bool]:
    """(text before the mark, what is after it, True); without one (text, its end, False).

    That end may still become the mark when more text comes. An empty mark is never found.
    """
    if not mark or not text:
        return text, "", False
    before, found, after = text.partition(mark)
    if found:
        return before, after, True
    keep = overlap(text, mark)
    return text[: len(text) - keep], text[len(text) - keep :], False


class Trim:
    """An answer's text without the space that only sets it off from reasoning and calls."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False
        self._adjoins = False

    def adjoin(self) -> None:
        """Something else than content came."""
        self._adjoins = True

    def feed(self, text: str) -> str:
        """What may be given out: space only once it is known to stand before more text."""
        text = self._held + text
        solid = text.rstrip(SPACE)
        self._held = text[len(solid) :]
        if not solid:
            return ""
        if self._adjoins and not self._begun:
            solid = solid.lstrip(SPACE)
        self._begun = True
        return solid

    def flush(self) -> str:
        """At the end: the space that was held, where it belongs to the text."""
        held, self._held = self._held, ""
        return "" if self._adjoins and not self._begun else held
