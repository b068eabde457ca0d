"""An answer as a whole: first the reasoning is split off, then calls are looked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .call_parser import CallParser
from .events import Content, Event, Reasoning, merged
from .marks import Trim
from .reasoning import ReasoningSplitter


class AnswerParser:
    """Text of one answer in, events out; without its parts all text is content.

    ``single`` keeps the first call only, as ``parallel_tool_calls: false`` asks.
    """

    def __init__(
        self,
        reasoning: ReasoningSplitter | None,
        calls: CallParser | None,
        *,
        single: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._single = single
        self._trim = Trim()

    @property
    def is_plain(self) -> bool:
        """Whether all text is content as it stands."""
        return self._reasoning is None and self._calls is None

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls if self._calls else 0

    def feed(self, text: str) -> list[Event]:
        """The events that more text brings."""
        if self.is_plain:
            return [Content(text)] if text else []
        split = self._reasoning.feed(text) if self._reasoning else iter((Content(text),))
        return merged(self._trimmed(self._with_calls(split)))

    def finish(self) -> list[Event]:
        """The events that the end of the text brings."""
        last = list(self._with_calls(self._reasoning.finish() if self._reasoning else ()))
        if self._calls is not None:
            last.extend(self._calls.finish())
        events = list(self._trimmed(last))
        # After a call, space at the end only sets off what follows the message.
        return merged(events if self.num_calls else [*events, Content(self._trim.flush())])

    def _with_calls(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Content) and self._calls is not None:
                yield from self._calls.feed(event.text)
            else:
                yield event

    def _trimmed(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Content):
                yield Content(self._trim.feed(event.text))
                continue
            self._trim.adjoin()
            if isinstance(event, Reasoning) or not (self._single and event.index):
                yield event
