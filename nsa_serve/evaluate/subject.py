"""What is evaluated: a model in this process or behind an HTTP API, asked in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ConfigError

# Natural log-probabilities by token id: of the likeliest tokens, and of the one that stands there.
Candidates = Mapping[int, float]
Advance = Callable[[int], None]  # told how many more items are done


@dataclass(frozen=True, slots=True)
class Question:
    """One user turn of a chat of its own, answered greedily."""

    text: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    prompt_tokens: int  # the chat template's included


class Subject(Protocol):
    """A model under test. Every call may raise ``EvaluationStopped``."""

    @property
    def description(self) -> dict[str, Any]:
        """What it is, for the record; results of subjects that differ here are never mixed."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer together; None where a server doesn't say."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by the model's tokenizer, nothing added."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, nothing added."""

    def count_chat(self, text: str) -> int:
        """Tokens of a chat whose one user turn is ``text``, up to where the answer begins."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Greedy answers, in the order of the questions.

        Questions that begin alike should stand longest first: a prefix cache then spares most.
        """

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability of every token of each window but its first."""

    def candidates(self, windows: Sequence[Sequence[int]]) -> list[list[Candidates]]:
        """The likeliest tokens at every position of each window but its first."""


def check_context(subject: Subject, needed: int) -> None:
    """Raise ``ConfigError`` where the subject's context is known to be shorter than ``needed``."""
    limit = subject.max_model_len
    if limit is not None and limit < needed:
        raise ConfigError(
            f"--contexts asks for {needed} tokens, but the model's context is {limit}: leave the "
            "longer ones out, or serve a model with a longer context"
        )
