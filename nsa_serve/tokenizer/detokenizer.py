"""Text of tokens as they come: whole characters only, constant work per token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

# Tokens of context that a non-byte vocabulary needs to decide on the space before a word.
_NUM_CONTEXT = 5
# A character has at most four bytes; more undecoded tokens than this are not one in the making.
_MAX_HELD = 8
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Decodes one sequence, token by token."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became whole by these tokens."""

    def flush(self) -> str:
        """At the end: what is left of an unfinished character, as U+FFFD."""


def detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special: bool
) -> Detokenizer:
    """A decoder for the tokens that follow ``prompt_token_ids``."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special=skip_special)
    return WindowDetokenizer(tokenizer, prompt_token_ids, skip_special=skip_special)


class ByteDetokenizer:
    """For byte-level vocabularies, where a token is its bytes whatever stands around it."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        token_bytes, skipped = self._token_bytes, self._skipped
        return self._decoder.decode(b"".join(token_bytes(t) for t in token_ids if t not in skipped))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For vocabularies whose text depends on neighbours: decodes a short window twice.

    Tokens [start, done) are text already given, and stand before the new ones so that these get
    the spaces they have inside a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._window = list(prompt_token_ids[-_NUM_CONTEXT:])
        self._done = len(self._window)

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join(self._feed_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        text = self._new_text()
        self._slide()
        return text

    def _feed_one(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._new_text()
        num_held = len(self._window) - self._done
        if text.endswith(_REPLACEMENT) and num_held <= _MAX_HELD:
            return ""
        self._slide()
        return text

    def _new_text(self) -> str:
        """Text of the tokens after ``done``."""
        before = self._decode(self._window[: self._done])
        return self._decode(self._window)[len(before) :]

    def _slide(self) -> None:
        del self._window[: self._done]
        self._done = len(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=bool(self._skipped))
