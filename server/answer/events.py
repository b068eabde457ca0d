"""What an assistant's text turns out to be, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a tool; its arguments follow. ``index`` counts calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, which are JSON text."""

    index: int
    text: str


Event = Reasoning | Content | CallBegun | CallArguments


def merged(events: Iterable[Event]) -> list[Event]:
    """The events with neighbours of one kind joined, and without empty ones."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        match event, last:
            case Reasoning(text) | Content(text) | CallArguments(text=text), _ if not text:
                pass
            case Reasoning(text), Reasoning(before):
                joined[-1] = Reasoning(before + text)
            case Content(text), Content(before):
                joined[-1] = Content(before + text)
            case CallArguments(index, text), CallArguments(same, before) if index == same:
                joined[-1] = CallArguments(index, before + text)
            case _:
                joined.append(event)
    return joined


@dataclass(slots=True)
class Call:
    """A whole call, or as much of it as came."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """Everything that was said, as it grows."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> Answer:
        answer = cls()
        for event in events:
            answer.add(event)
        return answer

    def add(self, event: Event) -> None:
        match event:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallBegun(_, name):
                self.calls.append(Call(name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
