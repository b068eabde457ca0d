"""Requests in the words of OpenAI's endpoints, and their streams read into outcomes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from .events import EventParser
from .http import Clock, HTTPClient, reason_of
from .outcome import Outcome, Session

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route of a server, and what every request to it carries.

    ``extra`` is added to each body: sampling, ``ignore_eos`` and whatever else the server takes.
    """

    client: HTTPClient
    model: str
    clock: Clock
    path: str = COMPLETIONS
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 6 * 3600.0  # seconds

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    async def send(self, session: Session, answers: list[str], outcome: Outcome) -> None:
        """Ask for the session's next turn, after ``answers`` to the turns before.

        All is told in ``outcome``, as it comes: tokens, errors, and that it was cancelled.
        """
        try:
            async with asyncio.timeout(self.timeout):
                await self._stream(self.body(session, answers), outcome)
        except TimeoutError:
            outcome.error = f"no whole answer within {self.timeout:g} s"
        except asyncio.CancelledError:
            outcome.interrupted = True
        except (OSError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"

    async def _stream(self, body: dict[str, Any], outcome: Outcome) -> None:
        reader = StreamReader(outcome, is_chat=self.is_chat)
        reply = await self.client.exchange("POST", self.path, body, reader.feed)
        if reply.status != 200:
            outcome.error = reason_of(reply)
        elif not outcome.error:
            outcome.error = reader.verdict()

    def body(self, session: Session, answers: list[str]) -> dict[str, Any]:
        """The request's JSON."""
        turn = session.turns[len(answers)]
        asked: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.is_chat:
            asked["messages"] = _messages(session, answers)
            asked["max_completion_tokens"] = turn.output_len
        else:
            asked["prompt"] = _prompt(session, answers)
            asked["max_tokens"] = turn.output_len
        return {**asked, **self.extra}


def _messages(session: Session, answers: list[str]) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": session.system}] if session.system else []
    for number, turn in enumerate(session.turns[: len(answers) + 1]):
        content = turn.content
        messages += [{"role": "user", "content": content}] if isinstance(content, str) else content
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


def _prompt(session: Session, answers: list[str]) -> str:
    """A conversation as one text, since this endpoint knows no turns."""
    text = session.system
    for number, turn in enumerate(session.turns[: len(answers) + 1]):
        if not isinstance(turn.content, str):
            raise ValueError("rows with messages need the chat endpoint: --backend openai-chat")
        text += turn.content + (answers[number] if number < len(answers) else "")
    return text


class StreamReader:
    """Reads one stream's pieces into its outcome, each event at the time its last byte came."""

    def __init__(self, outcome: Outcome, *, is_chat: bool) -> None:
        self._outcome = outcome
        self._is_chat = is_chat
        self._events = EventParser()

    def feed(self, piece: bytes, now: float) -> None:
        for data in self._events.feed(piece):
            if data == b"[DONE]":
                self._outcome.done = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                event = None
            if isinstance(event, dict):
                self._read(event, now)
            else:
                self._outcome.error = f"an event is no JSON object: {data[:200]!r}"

    def verdict(self) -> str:
        """What is wrong with a stream that has ended; empty where nothing is."""
        outcome = self._outcome
        if not outcome.token_times:
            return "the stream ended without a token"
        if not outcome.done and outcome.finish_reason is None:
            return "the stream ended in the middle of an answer"
        return ""

    def _read(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            self._outcome.error = _message(event["error"])
        if usage := event.get("usage"):
            self._read_usage(usage)
        for choice in event.get("choices") or ():
            self._read_choice(choice, now)

    def _read_choice(self, choice: dict[str, Any], now: float) -> None:
        outcome = self._outcome
        outcome.end = now
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
        text, carries_token = chat_token(choice) if self._is_chat else completion_token(choice)
        if carries_token:
            outcome.token_times.append(now)
            outcome.text += text

    def _read_usage(self, usage: dict[str, Any]) -> None:
        outcome = self._outcome
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.completion_tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens")


def completion_token(choice: dict[str, Any]) -> tuple[str, bool]:
    """(text, whether the chunk carries a token) of a chunk of a text completion.

    A token may have no text of its own (half a character, a special token); a chunk that only
    tells why the answer ended carries none.
    """
    text = choice.get("text") or ""
    return text, bool(text) or not choice.get("finish_reason")


def chat_token(choice: dict[str, Any]) -> tuple[str, bool]:
    """(text, whether the chunk carries a token) of a chunk of a chat completion.

    The chunk that opens the answer with its role, and one that only tells why it ended, carry none.
    """
    delta = choice.get("delta") or {}
    text = delta.get("content") or ""
    beside = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
    if text or beside:
        return text, True
    return "", not choice.get("finish_reason") and "role" not in delta


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return f"error event: {' '.join(str(message).split())[:500]}"
