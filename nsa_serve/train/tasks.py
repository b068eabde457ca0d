"""Retrieval tasks from templates: facts to hide in a text, and questions about them.

One module for training and evaluation: ``Split`` says from which words and wordings a task draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .phrases import PHRASES, Phrases, Split
from .values import VALUES, draw_value, look_alike

__all__ = [
    *("KINDS", "Exercise", "ReferenceEntry", "Split", "Turn", "long_copy", "lookup", "multi_key"),
    *("multi_value", "needle", "needle_among_alike", "variable_tracking"),
]

_SHORT, _IN_FULL = 0.25, 0.2  # of the questions ask for the value alone, for a sentence


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, the answer a model should give, and what an answer must hold to be right."""

    question: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exercise:
    """``facts`` are sentences to be put into a text, in this order; ``turns`` ask about them.

    ``keys`` are what the facts tell of: a text has room for one exercise with each, or its question
    would have two answers.
    """

    kind: str
    facts: tuple[str, ...]
    turns: tuple[Turn, ...]
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ReferenceEntry:
    """What a reference work says of one subject, and a question that it answers."""

    subject: str
    fact: str
    question: str
    answer: str
    value: str  # what a right answer holds


def needle(rng: random.Random, split: Split = Split.TRAIN) -> Exercise:
    """One fact, one question."""
    phrases = PHRASES[split]
    key, value = _key(rng, phrases), draw_value(rng, phrases, split)
    fact = rng.choice(phrases.facts).format(key=key, value=value)
    return Exercise("needle", (fact,), (_turn(rng, phrases, key, value),), frozenset([key]))


def needle_among_alike(
    rng: random.Random, split: Split = Split.TRAIN, *, num_alike: int = 3
) -> Exercise:
    """One fact is asked for; the others share its wording, its noun or owner, its value's form."""
    phrases = PHRASES[split]
    draw, wording = rng.choice(VALUES[split]), rng.choice(phrases.facts)
    noun, owner, value = rng.choice(phrases.nouns), rng.choice(phrases.owners), draw(rng, phrases)
    nouns = [other for other in phrases.nouns if other != noun]
    owners = [other for other in phrases.owners if other != owner]
    keys = [f"{other} of {owner}" for other in rng.sample(nouns, num_alike // 2)]
    keys += [f"{noun} of {other}" for other in rng.sample(owners, num_alike - num_alike // 2)]
    facts = [wording.format(key=key, value=look_alike(rng, phrases, value, draw)) for key in keys]
    key = f"{noun} of {owner}"
    facts.insert(rng.randrange(num_alike + 1), wording.format(key=key, value=value))
    turn = _turn(rng, phrases, key, value)
    return Exercise("needle_among_alike", tuple(facts), (turn,), frozenset([key, *keys]))


def multi_key(
    rng: random.Random, split: Split = Split.TRAIN, *, num_keys: int = 4, num_questions: int = 1
) -> Exercise:
    """Facts of one wording about several owners; each question asks for one of them."""
    phrases = PHRASES[split]
    noun, wording = rng.choice(phrases.nouns), rng.choice(phrases.facts)
    draw = rng.choice(VALUES[split])
    owners = rng.sample(phrases.owners, min(num_keys, len(phrases.owners)))
    pairs = [(f"{noun} of {owner}", draw(rng, phrases)) for owner in owners]
    facts = tuple(wording.format(key=key, value=value) for key, value in pairs)
    asked = rng.sample(pairs, min(num_questions, len(pairs)))
    turns = tuple(_turn(rng, phrases, *pair) for pair in asked)
    return Exercise("multi_key", facts, turns, frozenset(key for key, _ in pairs))


def multi_value(rng: random.Random, split: Split = Split.TRAIN, *, num_values: int = 3) -> Exercise:
    """Several values of one key, all asked for at once."""
    phrases = PHRASES[split]
    key, draw = _key(rng, phrases), rng.choice(VALUES[split])
    values = tuple(dict.fromkeys(draw(rng, phrases) for _ in range(num_values)))
    facts = tuple(
        rng.choice(phrases.several_facts).format(key=key, value=value) for value in values
    )
    question = rng.choice(phrases.several_questions).format(key=key)
    answer = f"The values are {_joined(values)}."
    return Exercise("multi_value", facts, (Turn(question, answer, values),), frozenset([key]))


def variable_tracking(
    rng: random.Random, split: Split = Split.TRAIN, *, num_hops: int = 3, num_chains: int = 2
) -> Exercise:
    """Chains of variables that take each other's value; the question asks for one chain."""
    phrases = PHRASES[split]
    names = rng.sample(phrases.variable_names, num_chains * num_hops)
    chains = [names[at : at + num_hops] for at in range(0, len(names), num_hops)]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), num_chains)]
    lines = [_chain(rng, phrases, c, value) for c, value in zip(chains, values, strict=True)]
    question = rng.choice(phrases.variable_questions).format(value=values[0])
    answer = f"{_joined(chains[0])}."
    turn = Turn(question, answer, tuple(chains[0]))
    facts = tuple(_interleaved(rng, lines))
    return Exercise("variable_tracking", facts, (turn,), frozenset(names))


def long_copy(
    rng: random.Random, split: Split = Split.TRAIN, *, passages: Sequence[str]
) -> Exercise:
    """Marked passages, one of which is to be repeated word for word."""
    phrases = PHRASES[split]
    mark, labels = rng.choice(phrases.passage_marks), rng.sample(phrases.labels, len(passages))
    facts = tuple(
        mark.format(label=label, text=text) for label, text in zip(labels, passages, strict=True)
    )
    asked = rng.randrange(len(passages))
    question = rng.choice(phrases.passage_questions).format(label=labels[asked])
    turn = Turn(question, passages[asked], (passages[asked],))
    return Exercise("long_copy", facts, (turn,), frozenset(labels))


def lookup(
    rng: random.Random, records: Sequence[ReferenceEntry], *, num_questions: int = 1
) -> Exercise:
    """What a reference work says of several subjects; each question asks about one."""
    asked = rng.sample(records, min(num_questions, len(records)))
    turns = tuple(Turn(record.question, record.answer, (record.value,)) for record in asked)
    return Exercise("lookup", tuple(record.fact for record in records), turns)


KINDS: dict[str, Callable[..., Exercise]] = {
    "needle": needle,
    "needle_among_alike": needle_among_alike,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "long_copy": long_copy,
}


def _key(rng: random.Random, phrases: Phrases) -> str:
    return f"{rng.choice(phrases.nouns)} of {rng.choice(phrases.owners)}"


def _turn(rng: random.Random, phrases: Phrases, key: str, value: str) -> Turn:
    question = rng.choice(phrases.questions).format(key=key)
    # One draw for the form and the wording.
    share = rng.random()
    if share < _SHORT:
        only = phrases.only[int(share / _SHORT * len(phrases.only))]
        return Turn(f"{question} {only}", value, (value,))
    if share > 1 - _IN_FULL and phrases.in_full:
        question += f" {phrases.in_full[int((1 - share) / _IN_FULL * len(phrases.in_full))]}"
    return Turn(question, f"The {key} is {value}.", (value,))


def _joined(values: Sequence[str]) -> str:
    return ", ".join(values[:-1]) + f" and {values[-1]}" if len(values) > 1 else values[0]


def _chain(rng: random.Random, phrases: Phrases, names: list[str], value: str) -> list[str]:
    first = rng.choice(phrases.assignments).format(name=names[0], value=value)
    wording = rng.choice(phrases.copies)
    pairs = zip(names[1:], names, strict=False)
    return [first, *(wording.format(name=name, source=source) for name, source in pairs)]


def _interleaved(rng: random.Random, chains: list[list[str]]) -> list[str]:
    """All lines, in an order that keeps each chain's own."""
    turns = [at for at, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    lines = [iter(chain) for chain in chains]
    return [next(lines[at]) for at in turns]
