"""Retrieval tasks on words, wordings and texts that training has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..train import tasks as made
from ..train.phrases import Split
from ..train.tasks import Exercise, Turn
from .haystack import Haystack, hidden, num_besides_hay
from .record import Record
from .scoring import score
from .subject import Advance, Question, Subject, check_context

CONTEXTS = (4096, 8192, 16384, 32768, 65536)
_SLACK = 64
_PASSAGE_SENTENCES = 3
_NUM_PASSAGES = 3
_NUM_COUNTRIES = 8
COUNTRY_FACTS = "country_facts"
Make = Callable[[random.Random, Haystack], Exercise]


def _multi_key(rng: random.Random, haystack: Haystack) -> Exercise:
    return haystack.draw(lambda r: made.multi_key(r, Split.HELD_OUT, num_keys=8), rng)


def _multi_value(rng: random.Random, haystack: Haystack) -> Exercise:
    return haystack.draw(lambda r: made.multi_value(r, Split.HELD_OUT, num_values=3), rng)


def _variable_tracking(rng: random.Random, haystack: Haystack) -> Exercise:
    return made.variable_tracking(rng, Split.HELD_OUT, num_hops=3, num_chains=3)


def _long_copy(rng: random.Random, haystack: Haystack) -> Exercise:
    sentences = haystack.sentences
    starts = rng.sample(range(len(sentences) - _PASSAGE_SENTENCES), _NUM_PASSAGES)
    passages = [" ".join(sentences[at : at + _PASSAGE_SENTENCES]) for at in starts]
    return made.long_copy(rng, Split.HELD_OUT, passages=passages)


def _country_facts(rng: random.Random, haystack: Haystack) -> Exercise:
    def make(rng: random.Random) -> Exercise:
        wanted = _form(rng.choice(haystack.facts))
        alike = {fact.value: fact for fact in haystack.facts if _form(fact) == wanted}
        some = rng.sample(list(alike.values()), min(_NUM_COUNTRIES, len(alike)))
        return made.lookup(rng, _swapped(some))

    return haystack.draw(make, rng)


def _form(fact: made.ReferenceEntry) -> str:
    """What a fact's question asks of any subject."""
    return fact.question.replace(fact.subject, "")


def _swapped(facts: Sequence[made.ReferenceEntry]) -> list[made.ReferenceEntry]:
    """Facts with each other's values: what a model knows of the world is of no use."""
    values = [fact.value for fact in facts]
    return [
        replace(
            fact,
            fact=fact.fact.replace(fact.value, value),
            answer=fact.answer.replace(fact.value, value),
            value=value,
        )
        for fact, value in zip(facts, values[1:] + values[:1], strict=True)
    ]


# Kind -> (its exercise, tokens of the longest answer).
KINDS: dict[str, tuple[Make, int]] = {
    "multi_key": (_multi_key, 64),
    "multi_value": (_multi_value, 160),
    "variable_tracking": (_variable_tracking, 64),
    "long_copy": (_long_copy, 384),
    COUNTRY_FACTS: (_country_facts, 96),
}
# Those that need no package but that of the text.
DEFAULT_KINDS = tuple(kind for kind in KINDS if kind != COUNTRY_FACTS)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """``samples`` exercises of each kind at each context (tokens of prompt and answer)."""

    text: str
    kinds: tuple[str, ...] = DEFAULT_KINDS
    contexts: tuple[int, ...] = CONTEXTS
    samples: int = 10
    seed: int = 0

    @property
    def num_prompts(self) -> int:
        return len(self.kinds) * len(self.contexts) * self.samples

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def run_tasks(
    tasks: TaskSet, subject: Subject, haystack: Haystack, record: Record, advance: Advance
) -> dict[str, Any]:
    """Ask whatever ``record`` lacks, and give the summary. ``advance`` is told of every prompt."""
    check_context(subject, max(tasks.contexts))
    for context in tasks.contexts:
        for kind in tasks.kinds:
            missing = [i for i in range(tasks.samples) if _name(kind, context, i) not in record]
            if missing:
                record.add(_ask(tasks, subject, haystack, kind, context, missing))
            advance(tasks.samples)
    return summary(tasks, record)


def _ask(
    tasks: TaskSet,
    subject: Subject,
    haystack: Haystack,
    kind: str,
    context: int,
    samples: Sequence[int],
) -> dict[str, dict[str, Any]]:
    turns, questions = [], []
    for sample in samples:
        turn, question = _exercise(tasks, subject, haystack, kind, context, sample)
        turns.append(turn)
        questions.append(question)
    answers = subject.answer(questions)
    return {
        _name(kind, context, sample): {
            "kind": kind,
            "context": context,
            "sample": sample,
            "prompt_tokens": answer.prompt_tokens,
            "question": turn.question,
            "expected": list(turn.values),
            "answer": answer.text,
            **score(turn.values, answer.text, is_copy=kind == "long_copy"),
        }
        for sample, turn, answer in zip(samples, turns, answers, strict=True)
    }


def _exercise(
    tasks: TaskSet, subject: Subject, haystack: Haystack, kind: str, context: int, sample: int
) -> tuple[Turn, Question]:
    make, max_tokens = KINDS[kind]
    rng = random.Random(f"{tasks.seed}/{kind}/{sample}")
    exercise = make(rng, haystack)
    room = context - max_tokens - _SLACK - num_besides_hay(subject, exercise)
    hay = haystack.take(room, share=sample / tasks.samples)
    depths = sorted(rng.random() for _ in exercise.facts)
    (turn,) = exercise.turns
    return turn, Question(hidden(hay, exercise.facts, depths, turn.question), max_tokens)


def summary(tasks: TaskSet, record: Record) -> dict[str, Any]:
    """Means of ``right`` and ``share`` by kind and context."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind in tasks.kinds:
        for context in tasks.contexts:
            items = [record.items[_name(kind, context, i)] for i in range(tasks.samples)]
            means = {
                key: round(sum(item[key] for item in items) / len(items), 4)
                for key in ("right", "share")
            }
            table.setdefault(kind, {})[str(context)] = means
    return {"by_kind": table}


def _name(kind: str, context: int, sample: int) -> str:
    return f"{kind}/{context}/{sample}"
