"""Calls of tools in an answer's text, in the forms that models write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .call_reader import CallReader
from .events import CallArguments, CallBegun, Content, Event
from .machine import Step, TextMachine
from .marks import SPACE, split_at

# What may stand between a mark and a call, and after a call: lists of calls are taken too.
_BEFORE = SPACE + "["
_AFTER = SPACE + ",;]"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a model marks its calls, each an object with name and arguments."""

    opening: str  # "" for none
    closing: str
    bare: bool = False  # whether a text may begin with a call, without a mark
    between: str = "\n"  # from one call to the next
    alone: bool = False  # a grammar allows calls only: what is none yet at the end was cut


# Qwen2.5, Qwen3 and the Hermes models.
HERMES = CallForm("<tool_call>", "</tool_call>")
# Llama 3.1 to 3.3: bare objects.
LLAMA3_JSON = CallForm("<|python_tag|>", "", bare=True, between="; ")
# What a grammar makes of a text that must be calls: a list of them.
CALL_LIST = CallForm("", "", bare=True, alone=True)


class CallParser(TextMachine):
    """Splits an answer's text into content and calls of the tools with these names.

    What begins like a call and isn't one is content; nothing is lost but the marks and the
    separators around calls. The events, joined, do not depend on how the text was cut.
    """

    def __init__(self, form: CallForm, names: frozenset[str]) -> None:
        super().__init__(self._before_call if form.bare else self._outside)
        self._form = form
        self._names = names
        self._kept = ""  # mark and separators, content if no call follows
        self._reader = CallReader(names)
        self._announced = False
        self.num_calls = 0

    def finish(self) -> Iterator[Event]:
        """The events that the end of the text brings."""
        if self._form.alone:
            return
        if self._state == self._in_call and not self._announced:
            yield Content(self._kept + "".join(self._reader.kept))
        elif self._state == self._before_call:
            yield Content(self._kept)
        yield Content(self._rest)

    def _outside(self, text: str) -> Step:
        before, rest, found = split_at(self._form.opening, text)
        yield Content(before)
        if found:
            self._kept = self._form.opening
            self._state = self._before_call
            yield rest
        else:
            self._rest = rest

    def _before_call(self, text: str) -> Step:
        rest = text.lstrip(_BEFORE)
        self._kept += text[: len(text) - len(rest)]
        if rest.startswith("{"):
            self._reader, self._announced = CallReader(self._names), False
            self._state = self._in_call
        elif rest:
            yield from self._no_call(self._kept)
        yield rest

    def _in_call(self, text: str) -> Step:
        reader = self._reader
        used = reader.feed(text)
        yield from self._of_call()
        if reader.done:
            self._kept = ""
            self._state = self._after_call
        elif reader.failed:
            begun = "" if self._announced else self._kept
            yield from self._no_call(begun + "".join(reader.kept))
        yield text[used:]

    def _of_call(self) -> Iterator[Event]:
        """What the reader knows of its call by now."""
        if not self._reader.begun:
            return
        if not self._announced:
            self._announced = True
            self.num_calls += 1
            yield CallBegun(self.num_calls - 1, self._reader.name or "")
        yield CallArguments(self.num_calls - 1, self._reader.take_arguments())

    def _after_call(self, text: str) -> Step:
        rest = text.lstrip(_AFTER)
        self._kept += text[: len(text) - len(rest)]
        closing = self._form.closing
        if rest.startswith("{"):
            self._state = self._before_call
        elif closing and rest.startswith(closing):
            self._kept = ""
            self._state = self._outside
            rest = rest[len(closing) :]
        elif closing.startswith(rest):
            self._rest, rest = rest, ""
        else:
            yield from self._no_call(self._kept)
        yield rest

    def _no_call(self, text: str) -> Iterator[Event]:
        self._kept = ""
        self._state = self._outside
        yield Content(text)
