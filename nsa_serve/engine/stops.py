"""Stop strings in text that comes in pieces."""

from __future__ import annotations


class StopMatcher:
    """Finds the stop string that is complete first, and holds back what may still become one.

    First is meant in characters, so the result does not depend on how the text was cut into
    pieces: the match with the earliest end; of those that end together, the longest.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include_stop = include_stop
        # What is held back ends in one of these; most text does not.
        self._inner = frozenset(char for stop in self._stops for char in stop[:-1])
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that may be given out; nothing once a stop string has matched."""
        if not self._stops or not text:
            return text
        if self.matched is not None:
            return ""
        buffer = self._held + text
        match = self._first_match(buffer)
        if match is None:
            keep = self._num_held(buffer)
            self._held = buffer[len(buffer) - keep :]
            return buffer[: len(buffer) - keep]
        start, end = match
        self.matched = buffer[start:end]
        self._held = ""
        return buffer[: end if self._include_stop else start]

    def flush(self) -> str:
        """At the end: what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, int] | None:
        """(start, end) of the first complete stop string."""
        ends = []
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if not ends:
            return None
        end, start = min(ends)
        return start, end

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` with which some stop string begins."""
        if buffer[-1] not in self._inner:
            return 0
        return max(overlap(buffer, stop) for stop in self._stops)


def overlap(buffer: str, stop: str) -> int:
    """Length of the longest end of ``buffer`` that is a proper beginning of ``stop``."""
    first = stop[0]
    at = buffer.find(first, max(0, len(buffer) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(buffer[at:]):
            return len(buffer) - at
        at = buffer.find(first, at + 1)
    return 0
