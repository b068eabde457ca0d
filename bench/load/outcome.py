"""What is asked of a server, and what came back when."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. In a conversation, ``content`` is what is added to it."""

    content: str | Messages
    output_len: int  # tokens wanted, and the most the server may send
    prompt_len: int | None = None  # tokens of ``content``; None: known to the server alone


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that wait for each other. Most datasets have sessions of one turn."""

    turns: tuple[Turn, ...]
    system: str = ""  # said before the first turn


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. Times are the clock's, in seconds."""

    turn: Turn
    due: float  # when it was to be sent: its arrival, or the end of the turn before
    sent: float
    token_times: list[float] = field(default_factory=list)  # of chunks that carry tokens
    end: float | None = None  # of the last chunk with a choice
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None  # as the server counts
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    interrupted: bool = False  # by the person who runs the test
    done: bool = False  # the stream was closed in order

    @property
    def success(self) -> bool:
        return not self.error and not self.interrupted and bool(self.token_times)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first chunk that carries a token."""
        return self.token_times[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending to the last chunk."""
        return (self.token_times[-1] if self.end is None else self.end) - self.sent

    @property
    def itls(self) -> list[float]:
        """Seconds between neighbouring chunks with tokens."""
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def output_len(self) -> int:
        """Tokens sent, by the server's count if it gives one, else chunks."""
        return self.completion_tokens or len(self.token_times)

    @property
    def input_len(self) -> int:
        """Prompt tokens, by the server's count if it gives one, else by the dataset's."""
        return self.prompt_tokens or self.turn.prompt_len or 0

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; 0 for an answer of one token."""
        after_first = self.output_len - 1
        return (self.latency - self.ttft) / after_first if after_first > 0 else 0.0
