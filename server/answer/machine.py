"""Machines that read text as it comes: each state takes what there is and says what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .events import Event

# The events of a state and, last, the text that it leaves to the next one, if any.
Step = Iterator[Event | str]


class TextMachine:
    """Feeds text to its state until none is left, or the state keeps it in ``_rest`` for later."""

    def __init__(self, start: Callable[[str], Step]) -> None:
        self._state = start
        self._rest = ""

    def feed(self, text: str) -> Iterator[Event]:
        """The events that more text brings."""
        rest, self._rest = self._rest + text, ""
        while rest:
            given, rest = rest, ""
            for item in self._state(given):
                if isinstance(item, str):
                    rest = item
                else:
                    yield item
