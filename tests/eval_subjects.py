"""Stand-ins for models under evaluation: what they remember, and when they fail, is scripted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nsa_serve.errors import EvaluationStopped
from nsa_serve.evaluate.subject import Answer, Question

TEMPLATE_WORDS = 7


@dataclass
class Reader:
    """Repeats the last ``memory`` words before the question. Tokens are words."""

    memory: int = 1 << 20
    max_model_len: int | None = 1 << 20
    num_calls: int | None = None  # until it fails; None: never
    logprob: float = -1.0
    asked: list[Question] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)

    @property
    def description(self) -> dict[str, Any]:
        return {"model": "reader", "memory": self.memory}

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def count_chat(self, text: str) -> int:
        return TEMPLATE_WORDS + len(text.split())

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self._count_call()
        self.asked += questions
        return [Answer(self._seen(q.text), self.count_chat(q.text)) for q in questions]

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        self._count_call()
        self.windows += [list(window) for window in windows]
        return [[self.logprob] * (len(window) - 1) for window in windows]

    def _seen(self, text: str) -> str:
        words = text.rpartition("\n\n")[0].split()
        return " ".join(words[max(0, len(words) - self.memory) :])

    def _count_call(self) -> None:
        if self.num_calls is not None:
            self.num_calls -= 1
            if self.num_calls < 0:
                raise EvaluationStopped("the reader fell asleep")
