"""One call of a tool: a JSON object with a name and arguments, read as its text comes."""

from __future__ import annotations

import json
from collections.abc import Callable

from .marks import SPACE

_ARGUMENTS = frozenset(("arguments", "parameters"))


class _Span:
    """Finds the end of a JSON string, array or object by its quotes and brackets."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def ends_with(self, char: str) -> bool:
        if self._in_string:
            return self._string_ends_with(char) and self._depth == 0
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _string_ends_with(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            return True
        return False


class CallReader:
    """Reads one object, a character at a time, so that nothing depends on how text was cut.

    It fails at the first character that can't be of a call of one of ``names``. The call has
    begun once its name is known and its arguments have begun (or the object has ended). Inside
    the arguments only quotes and brackets are read: whether they suit the tool is the client's
    to check, as with OpenAI.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._next: Callable[[str], bool] = self._open
        self._key = ""
        self._value: list[str] = []
        self._span = _Span()
        self._arguments: list[str] = []  # not taken yet
        self._has_arguments = False
        self.kept: list[str] = []  # characters that no part of a call stands for
        self.name: str | None = None
        self.done = False
        self.failed = False

    @property
    def begun(self) -> bool:
        return self.name is not None and self._has_arguments

    def feed(self, text: str) -> int:
        """Read on; the number of characters that were used, fewer than all at the end."""
        for at, char in enumerate(text):
            if not self._next(char):
                self.failed = True
                return at
            if self.done:
                return at + 1
        return len(text)

    def take_arguments(self) -> str:
        """The arguments since the last call, once the call has begun."""
        taken, self._arguments = "".join(self._arguments), []
        return taken

    def _open(self, char: str) -> bool:
        return self._keep(char, self._key_or_end) if char == "{" else False

    def _key_or_end(self, char: str) -> bool:
        return self._end() if char == "}" else self._key_start(char)

    def _key_start(self, char: str) -> bool:
        if char in SPACE:
            return self._keep(char, self._next)
        return self._start(char, self._in_key) if char == '"' else False

    def _in_key(self, char: str) -> bool:
        self._value.append(char)
        self.kept.append(char)
        if not self._span.ends_with(char):
            return True
        key = _decoded("".join(self._value))
        if not isinstance(key, str) or self._is_twice(key):
            self._value.pop()
            self.kept.pop()
            return False
        self._key = key
        self._next = self._colon
        return True

    def _is_twice(self, key: str) -> bool:
        if key == "name":
            return self.name is not None
        return key in _ARGUMENTS and self._has_arguments

    def _colon(self, char: str) -> bool:
        if char in SPACE:
            return self._keep(char, self._next)
        return self._keep(char, self._value_start) if char == ":" else False

    def _value_start(self, char: str) -> bool:
        if char in SPACE:
            return self._keep(char, self._next)
        if self._key == "name":
            return self._start(char, self._in_value) if char == '"' else False
        if self._key in _ARGUMENTS and char == "{":
            return self._start_arguments(char)
        if char in '"{[':
            wanted = self._key not in _ARGUMENTS or char == '"'
            return self._start(char, self._in_value) if wanted else False
        return self._start(char, self._in_scalar) if char.isalnum() or char == "-" else False

    def _start_arguments(self, char: str) -> bool:
        self._has_arguments = True
        self._span = _Span()
        self._next = self._in_arguments
        if self.begun:
            self.kept.clear()
        return self._in_arguments(char)

    def _in_arguments(self, char: str) -> bool:
        self._arguments.append(char)
        # Without a name this may be no call, and all of it is given back.
        if not self.begun:
            self.kept.append(char)
        if self._span.ends_with(char):
            self._next = self._comma_or_end
        return True

    def _in_value(self, char: str) -> bool:
        self._value.append(char)
        self.kept.append(char)
        if not self._span.ends_with(char):
            return True
        if not self._end_value():
            self._value.pop()
            self.kept.pop()
            return False
        self._next = self._comma_or_end
        return True

    def _in_scalar(self, char: str) -> bool:
        if char in SPACE or char in ",}":
            return self._end_value() and self._comma_or_end(char)
        self._value.append(char)
        return self._keep(char, self._next) if char.isalnum() or char in "+-." else False

    def _end_value(self) -> bool:
        """Take in a whole value; False where the call can't have it."""
        value = _decoded("".join(self._value))
        if self._key == "name":
            if value not in self._names:
                return False
            self.name = str(value)
            if self.begun:
                self.kept.clear()
        elif self._key in _ARGUMENTS:
            # Some models write the arguments as a string that holds the JSON, or as null.
            if not (value is None or isinstance(value, str)):
                return False
            self._give(value or "{}")
        return value is not _WRONG

    def _give(self, arguments: str) -> None:
        self._has_arguments = True
        self._arguments.append(arguments)
        if self.begun:
            self.kept.clear()

    def _comma_or_end(self, char: str) -> bool:
        if char in SPACE:
            return self._keep(char, self._comma_or_end)
        if char == ",":
            return self._keep(char, self._key_start)
        return self._end() if char == "}" else False

    def _end(self) -> bool:
        if self.name is None:
            return False
        if not self._has_arguments:
            self._give("{}")
        self.done = True
        return True

    def _keep(self, char: str, then: Callable[[str], bool]) -> bool:
        self.kept.append(char)
        self._next = then
        return True

    def _start(self, char: str, then: Callable[[str], bool]) -> bool:
        """A key or value begins with this character."""
        self._value = []
        self._span = _Span()
        self._next = then
        return then(char)


_WRONG = object()


def _decoded(text: str) -> object:
    """The JSON value of a text, or ``_WRONG`` where it is none that can be sent on."""
    try:
        value: object = json.loads(text, strict=False)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        return _WRONG
    return value
