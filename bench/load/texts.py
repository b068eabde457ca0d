"""Texts of an exact number of tokens, counted by the server's own tokenizer or a local one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from ...errors import ConfigError
from .http import HTTPClient, reason_of

_ATTEMPTS = 24
_TRIES_PER_TEXT = 8
_TOKENS_PER_PIECE = 64  # about what one call of ``more`` gives
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


class Tokens(Protocol):
    """Turns text into tokens and back. Special tokens are never added."""

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, token_ids: list[int]) -> str: ...

    async def num_added(self) -> int:
        """Tokens that the server puts before a text of its own accord, such as a BOS."""


@dataclass(frozen=True, slots=True)
class ServerTokens:
    """The server's ``/tokenize`` and ``/detokenize``, as vLLM and nsa-serve have them."""

    client: HTTPClient
    model: str

    async def encode(self, text: str) -> list[int]:
        return await self._tokenize(text, add_special=False)

    async def decode(self, token_ids: list[int]) -> str:
        asked = {"model": self.model, "tokens": token_ids}
        reply = await self.client.exchange("POST", "/detokenize", asked)
        if reply.status != 200:
            raise ConfigError(f"the server can't detokenize ({reason_of(reply)}): give --tokenizer")
        return str(reply.json()["prompt"])

    async def num_added(self) -> int:
        plain = await self._tokenize("a", add_special=False)
        return len(await self._tokenize("a", add_special=True)) - len(plain)

    async def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        asked = {"model": self.model, "prompt": text, "add_special_tokens": add_special}
        reply = await self.client.exchange("POST", "/tokenize", asked)
        if reply.status != 200:
            raise ConfigError(
                f"the server can't count tokens ({reason_of(reply)}): give --tokenizer, a folder "
                "or a Hub id"
            )
        found: list[int] = reply.json()["tokens"]
        return found


class LocalTokens:
    """A ``tokenizer.json``: a file, the folder it is in, or a Hub id."""

    def __init__(self, name: str) -> None:
        path = Path(name)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if file.is_file():
                self._tokenizer = Tokenizer.from_file(str(file))
            else:
                self._tokenizer = Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises plain Exceptions
            raise ConfigError(f"--tokenizer {name}: {error}") from None

    async def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    async def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    async def num_added(self) -> int:
        return len(self._tokenizer.encode("a").ids) - len(await self.encode("a"))


def random_words(rng: random.Random) -> str:
    """32 pronounceable words that mean nothing, each with a space before it."""
    return "".join(f" {_random_word(rng)}" for _ in range(32))


def _random_word(rng: random.Random) -> str:
    syllables = rng.randint(1, 3)
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


async def exact_text(
    num_tokens: int, tokens: Tokens, more: Callable[[], str], *, prefix: str = ""
) -> str:
    """Text after ``prefix`` such that both together are ``num_tokens`` tokens more than it.

    ``more`` gives text to cut from. Cutting tokens and joining texts can change how a tokenizer
    splits the seam, so the result is counted anew until it fits, with fresh text if it never does.
    Raises ``ConfigError`` after some tries.
    """
    if num_tokens <= 0:
        return ""
    target = num_tokens + (len(await tokens.encode(prefix)) if prefix else 0)
    for _ in range(_TRIES_PER_TEXT):
        text = await _fit(target, tokens, more, prefix)
        if text is not None:
            return text
    raise ConfigError(f"no text of exactly {num_tokens} tokens was found with this tokenizer")


async def _fit(target: int, tokens: Tokens, more: Callable[[], str], prefix: str) -> str | None:
    text, missing = "", target
    while missing > 0:
        text += "".join(more() for _ in range(missing // _TOKENS_PER_PIECE + 1))
        ids = await tokens.encode(prefix + text)
        missing = target - len(ids)
    for _ in range(_ATTEMPTS):
        if len(ids) == target:
            return text
        if len(ids) > target:
            cut = (await tokens.decode(ids[:target])).rstrip("\ufffd")
            if not cut.startswith(prefix):
                return None
            text = cut.removeprefix(prefix)
        else:
            text += " a"
        ids = await tokens.encode(prefix + text)
    return None
