"""Short prompts answered by a model and by its dense base, side by side, and how far apart.

Which answer is better is for people to judge (``verdicts``). What is measured here is how likely
the base finds the model's answers, and how far the model's choice of tokens is from the base's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..train.held_out_prompts import HELD_OUT_PROMPTS
from .in_process import InProcess
from .record import Item, Record
from .subject import Advance, Candidates, Question, Subject
from .verdicts import Verdict, count_verdicts, is_same

_AT_ONCE = 25  # prompts between two writes of the record
_MOST_PROMPTS, _LONGEST_PROMPT = 1000, 2000  # of a file; characters
_LEAST = 1e-6  # probability of all tokens that are not among the candidates, at least


@dataclass(frozen=True, slots=True)
class ChatSet:
    """What both are asked; answers have at most ``max_tokens``."""

    prompts: tuple[str, ...] = HELD_OUT_PROMPTS
    max_tokens: int = 200

    def settings(self, base: InProcess) -> dict[str, Any]:
        """What a record must agree with to be gone on with; it has the prompts themselves."""
        found = {"num_prompts": len(self.prompts), "max_tokens": self.max_tokens}
        if self.prompts != HELD_OUT_PROMPTS[: len(self.prompts)]:
            found["prompts"] = zlib.crc32("\n".join(self.prompts).encode())
        return {**found, "base": base.description}


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty. Raises ``ConfigError``."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--questions {path} can't be read: {error}") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not 0 < len(found) <= _MOST_PROMPTS or max(map(len, found)) > _LONGEST_PROMPT:
        raise ConfigError(
            f"--questions {path} has {len(found)} prompts; 1 to {_MOST_PROMPTS} are asked, "
            f"a line each, of up to {_LONGEST_PROMPT} characters"
        )
    return found


def run_chat(
    chats: ChatSet, subject: Subject, base: InProcess, record: Record, advance: Advance
) -> dict[str, Any]:
    """Ask both whatever ``record`` lacks, measure, and give the summary.

    Raises ``ConfigError`` where the two do not have one tokenizer.
    """
    prompts = chats.prompts
    if subject.encode(prompts[0]) != base.encode(prompts[0]):
        raise ConfigError("--base has another tokenizer: their answers can't be compared by token")
    missing = [number for number in range(len(prompts)) if _name(number) not in record]
    advance(len(prompts) - len(missing))
    for at in range(0, len(missing), _AT_ONCE):
        numbers = missing[at : at + _AT_ONCE]
        asked = [prompts[number] for number in numbers]
        found = _compare(asked, subject, base, chats.max_tokens)
        record.add({_name(n): item for n, item in zip(numbers, found, strict=True)})
        advance(len(numbers))
    return summary(record)


def summary(record: Record) -> dict[str, Any]:
    """Means over all tokens, in nats, and the verdicts as far as there are any."""
    items = list(record.items.values())
    return {
        "base_logprob_of_answers": _mean(items, "base_logprob", "tokens"),
        "base_logprob_of_own": _mean(items, "base_logprob_of_own", "base_tokens"),
        "divergence": _mean(items, "divergence", "base_tokens"),
        "same": sum(is_same(item) for item in items),
        "verdicts": count_verdicts(items),
    }


def divergence(base: Candidates, model: Candidates) -> float:
    """A lower bound of KL(base ‖ model), in nats: all tokens but both's candidates count as one."""
    shared = base.keys() & model.keys()
    total = math.fsum(math.exp(base[t]) * (base[t] - model[t]) for t in shared)
    rest, other = (
        max(_LEAST, 1 - math.fsum(math.exp(own[t]) for t in shared)) for own in (base, model)
    )
    return total + rest * math.log(rest / other)


def _compare(
    prompts: Sequence[str], subject: Subject, base: InProcess, max_tokens: int
) -> list[Item]:
    questions = [Question(prompt, max_tokens) for prompt in prompts]
    answers, own = (
        [answer.text for answer in asked.answer(questions)] for asked in (subject, base)
    )
    spans = [_windows(base, prompts, texts, max_tokens) for texts in (answers, own)]
    of_answers, of_own = (base.candidates([window for window, _ in each]) for each in spans)
    models = subject.candidates([window for window, _ in spans[1]])
    found: list[Item] = []
    for at, prompt in enumerate(prompts):
        (said, said_at), (wanted, wanted_at) = spans[0][at], spans[1][at]
        distances = [divergence(*pair) for pair in zip(of_own[at], models[at], strict=True)]
        found.append(
            {
                "prompt": prompt,
                "answer": answers[at],
                "base_answer": own[at],
                "tokens": len(said) - said_at,
                "base_tokens": len(wanted) - wanted_at,
                "base_logprob": _likelihood(said, said_at, of_answers[at]),
                "base_logprob_of_own": _likelihood(wanted, wanted_at, of_own[at]),
                "divergence": _rounded(distances[wanted_at - 1 :]),
                "verdict": Verdict.EQUAL if answers[at] == own[at] else None,
            }
        )
    return found


def _windows(
    base: InProcess, prompts: Sequence[str], answers: Sequence[str], max_tokens: int
) -> list[tuple[list[int], int]]:
    """Tokens of each prompt with its answer, and where the answer begins.

    The end of the turn belongs to the answer, unless it was cut at ``max_tokens``.
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, said = base.encode_answered(prompt, answer)
        found.append((asked + said[:max_tokens], len(asked)))
    return found


def _likelihood(window: Sequence[int], start: int, candidates: Sequence[Candidates]) -> float:
    """Mean log-probability of the tokens from ``start`` on."""
    own = [each[token] for token, each in zip(window[1:], candidates, strict=True)]
    return _rounded(own[start - 1 :])


def _rounded(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 5)


def _mean(items: Sequence[Item], value: str, weight: str) -> float:
    total = int(sum(item[weight] for item in items))
    return round(math.fsum(item[value] * item[weight] for item in items) / total, 5)


def _name(number: int) -> str:
    return f"{number + 1:02d}"
