"""Perplexity of held-out text: the same tokens, read in windows of each length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from .record import Record
from .subject import Advance, Subject, check_context

CONTEXTS = (2048, 8192, 32768, 65536)


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of every length in ``contexts`` over one run of tokens, end to end."""

    text: str
    contexts: tuple[int, ...] = CONTEXTS
    max_tokens: int | None = None  # of the text; None: all

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def run_length(self, available: int) -> int:
        """Tokens that windows of every length cover alike. Raises ``ConfigError`` for none."""
        step = math.lcm(*self.contexts)
        length = min(available, self.max_tokens or available) // step * step
        if length == 0:
            raise ConfigError(
                f"--text gives {available} tokens, too few for windows of {step}: name a longer "
                "one, or leave the long --contexts out"
            )
        return length

    def num_windows(self, length: int) -> int:
        return sum(length // context for context in self.contexts)


def run_perplexity(
    windows: Windows, subject: Subject, tokens: Sequence[int], record: Record, advance: Advance
) -> dict[str, Any]:
    """Score the windows that ``record`` lacks, one at a time, and give the summary.

    A window of L positions has L − 2 predictions: its first token has no past, and its last
    position is left for the one token that a server generates at least.
    """
    check_context(subject, max(windows.contexts))
    for context in windows.contexts:
        for index in range(windows.run_length(len(tokens)) // context):
            name = f"{context}/{index}"
            if name not in record:
                window = tokens[index * context : (index + 1) * context - 1]
                (logprobs,) = subject.logprobs([window])
                nll = -math.fsum(logprobs) / len(logprobs)
                record.add({name: {"context": context, "tokens": len(logprobs), "nll": nll}})
            advance(1)
    return summary(windows, record)


def summary(windows: Windows, record: Record) -> dict[str, Any]:
    """Perplexity and bits per token by window length."""
    by_context = {}
    for context in windows.contexts:
        items = [item for item in record.items.values() if item["context"] == context]
        count = sum(item["tokens"] for item in items)
        nll = math.fsum(item["nll"] * item["tokens"] for item in items) / count
        by_context[str(context)] = {
            "perplexity": round(math.exp(nll), 4),
            "bits_per_token": round(nll / math.log(2), 4),
            "tokens": count,
        }
    return {"by_context": by_context}
