"""What a model thinks between <think> and </think>, apart from what it answers."""

from __future__ import annotations

from collections.abc import Iterator

from ..settings import ReasoningParser
from .events import Content, Event, Reasoning
from .machine import Step, TextMachine
from .marks import SPACE, Trim, split_at

_OPENING, _CLOSING = "<think>", "</think>"


class ReasoningSplitter(TextMachine):
    """Splits text into reasoning and content; ``opened`` says that it begins with reasoning.

    Reasoning comes without the space at its ends. A </think> in the answer is content.
    """

    def __init__(self, *, opened: bool) -> None:
        super().__init__(self._at_start)
        self._opened = opened
        self._trim = Trim()
        self._trim.adjoin()

    def finish(self) -> Iterator[Event]:
        """The events that the end of the text brings."""
        if self._state == self._thinking or (self._state == self._at_start and self._opened):
            yield Reasoning(self._trim.feed(self._rest))
        else:
            yield Content(self._rest)

    def _at_start(self, text: str) -> Step:
        solid = text.lstrip(SPACE)
        if solid.startswith(_OPENING):
            self._state = self._thinking
            yield solid[len(_OPENING) :]
        elif _OPENING.startswith(solid):
            self._rest = text
        else:
            self._state = self._thinking if self._opened else self._answering
            yield text

    def _thinking(self, text: str) -> Step:
        before, rest, found = split_at(_CLOSING, text)
        yield Reasoning(self._trim.feed(before))
        if found:
            self._state = self._answering
            yield rest
        else:
            self._rest = rest

    def _answering(self, text: str) -> Step:
        yield Content(text)


def reasoning_splitter(parser: ReasoningParser, prompt: str) -> ReasoningSplitter | None:
    """The splitter for what follows a prompt, or None where the prompt has ended the thinking."""
    end = prompt.rstrip(SPACE)
    if end.endswith(_CLOSING):
        return None
    opened = parser is ReasoningParser.DEEPSEEK_R1 or end.endswith(_OPENING)
    return ReasoningSplitter(opened=opened)
