"""A model behind an OpenAI API: ours, or any other's that echoes log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tokenizers

from ..errors import ConfigError, EvaluationStopped
from ..request import MAX_LOGPROBS
from .subject import Answer, Candidates, Question

_ERROR_CHARACTERS = 300
# Room for a chat template that only the server has.
_TEMPLATE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where the API is, and how it is asked."""

    url: str  # with or without /v1
    model: str | None = None  # None: the first that the server names
    api_key: str | None = None
    concurrency: int = 4
    timeout: float = 600.0  # seconds for one answer
    tokenizer: str | None = None  # a folder or Hub id, for servers without /tokenize


class OverHTTP:
    """``Subject`` of a server. Tokens are counted by its ``/tokenize`` or by a tokenizer here."""

    def __init__(self, address: ServerAddress, client: httpx.Client) -> None:
        """Raises ``ConfigError`` where no server answers there, or it serves another model."""
        self._address = address
        self._client = client
        self._tokenizer = None if address.tokenizer is None else _tokenizer(address.tokenizer)
        card = self._card()
        self.model = str(card["id"])
        self._max_model_len: int | None = card.get("max_model_len")

    @property
    def description(self) -> dict[str, Any]:
        return {
            "through": "http",
            "url": self._address.url,
            "model": self.model,
            "max_model_len": self._max_model_len,
        }

    @property
    def max_model_len(self) -> int | None:
        return self._max_model_len

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return self._tokenize({"prompt": text, "add_special_tokens": False})
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        with ThreadPoolExecutor(self._address.concurrency) as pool:
            return [len(tokens) for tokens in pool.map(self.encode, texts)]

    def count_chat(self, text: str) -> int:
        if self._tokenizer is not None:
            return len(self.encode(text)) + _TEMPLATE_TOKENS
        return len(self._tokenize({"messages": [{"role": "user", "content": text}]}))

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        with ThreadPoolExecutor(self._address.concurrency) as pool:
            return list(pool.map(self._ask, questions))

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        with ThreadPoolExecutor(self._address.concurrency) as pool:
            return list(pool.map(self._echo, windows))

    def candidates(self, windows: Sequence[Sequence[int]]) -> list[list[Candidates]]:
        with ThreadPoolExecutor(self._address.concurrency) as pool:
            return list(pool.map(self._candidates, windows))

    def _ask(self, question: Question) -> Answer:
        reply = self._post(
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": question.text}],
                "max_tokens": question.max_tokens,
                "temperature": 0,
            },
        )
        text = reply["choices"][0]["message"]["content"] or ""
        return Answer(str(text), int(reply["usage"]["prompt_tokens"]))

    def _echo(self, window: Sequence[int]) -> list[float]:
        asked = {"prompt": list(window), "max_tokens": 1, "temperature": 0, "echo": True}
        reply = self._post("/v1/completions", {**asked, "logprobs": 0})
        logprobs = (reply["choices"][0]["logprobs"] or {}).get("token_logprobs") or []
        if len(logprobs) < len(window):
            raise EvaluationStopped(
                "the server does not echo the log-probabilities of a prompt: evaluate it in process"
            )
        return [float(value) for value in logprobs[1 : len(window)]]

    def _candidates(self, window: Sequence[int]) -> list[Candidates]:
        asked = {"prompt": list(window), "max_tokens": 1, "temperature": 0}
        reply = self._post("/v1/completions", {**asked, "prompt_logprobs": MAX_LOGPROBS})
        entries = reply["choices"][0].get("prompt_logprobs") or []
        if len(entries) != len(window):
            raise EvaluationStopped(
                "the server gives no prompt_logprobs of a prompt: evaluate it in process"
            )
        return [
            {int(token): float(value["logprob"]) for token, value in entry.items()}
            for entry in entries[1:]
        ]

    def _tokenize(self, asked: dict[str, Any]) -> list[int]:
        found: list[int] = self._post("/tokenize", asked)["tokens"]
        return found

    def _card(self) -> dict[str, Any]:
        try:
            served = self._client.get("/v1/models")
            cards = {card["id"]: card for card in served.raise_for_status().json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--url {self._address.url}: no OpenAI API there: {error}") from None
        name = self._address.model or next(iter(cards), None)
        if name not in cards:
            raise ConfigError(f"the server has no model {name!r}; it serves {', '.join(cards)}")
        found: dict[str, Any] = cards[name]
        return found

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            reply = self._client.post(path, json={"model": self.model, **body})
        except httpx.HTTPError as error:
            raise EvaluationStopped(f"{path}: {error or type(error).__name__}") from error
        if reply.status_code != 200:
            shown = reply.text[:_ERROR_CHARACTERS]
            raise EvaluationStopped(f"{path} was answered with {reply.status_code}: {shown}")
        return reply.json()


def _tokenizer(name: str) -> tokenizers.Tokenizer:
    file = Path(name).expanduser() / "tokenizer.json"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigError(f"--tokenizer {name}: {error}") from None


def open_client(address: ServerAddress) -> httpx.Client:
    """A client of the server; the caller closes it. Raises ``ConfigError`` for no address."""
    headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
    base = address.url.rstrip("/").removesuffix("/v1")
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=address.timeout)
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ConfigError(f"--url {address.url}: {error}") from None
