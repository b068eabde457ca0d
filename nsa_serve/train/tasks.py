"""Retrieval tasks from templates: facts to hide in a text, and questions about them.

One module for training and evaluation: ``Split`` says from which words and wordings a task draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .phrases import PHRASES, Phrases, Split

__all__ = [
    *("KINDS", "Exercise", "Record", "Split", "Turn", "long_copy", "lookup", "multi_key"),
    *("multi_value", "needle", "variable_tracking"),
]

_ONLY = " Answer with the value only."


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, the answer a model should give, and what an answer must hold to be right."""

    question: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exercise:
    """``facts`` are sentences to be put into a text, in this order; ``turns`` ask about them."""

    kind: str
    facts: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What a reference work says of one subject, and a question that it answers."""

    subject: str
    fact: str
    question: str
    answer: str
    value: str  # what a right answer holds


def needle(rng: random.Random, split: Split = Split.TRAIN) -> Exercise:
    """One fact, one question."""
    phrases = PHRASES[split]
    key, value = _key(rng, phrases), draw_value(rng, phrases)
    fact = rng.choice(phrases.facts).format(key=key, value=value)
    return Exercise("needle", (fact,), (_turn(rng, phrases, key, value),))


def multi_key(
    rng: random.Random, split: Split = Split.TRAIN, *, num_keys: int = 4, num_questions: int = 1
) -> Exercise:
    """Facts of one wording about several owners; each question asks for one of them."""
    phrases = PHRASES[split]
    noun, wording = rng.choice(phrases.nouns), rng.choice(phrases.facts)
    draw = rng.choice(_VALUES)
    owners = rng.sample(phrases.owners, min(num_keys, len(phrases.owners)))
    pairs = [(f"{noun} of {owner}", draw(rng, phrases)) for owner in owners]
    facts = tuple(wording.format(key=key, value=value) for key, value in pairs)
    asked = rng.sample(pairs, min(num_questions, len(pairs)))
    return Exercise("multi_key", facts, tuple(_turn(rng, phrases, *pair) for pair in asked))


def multi_value(rng: random.Random, split: Split = Split.TRAIN, *, num_values: int = 3) -> Exercise:
    """Several values of one key, all asked for at once."""
    phrases = PHRASES[split]
    key, draw = _key(rng, phrases), rng.choice(_VALUES)
    values = tuple(dict.fromkeys(draw(rng, phrases) for _ in range(num_values)))
    facts = tuple(
        rng.choice(phrases.several_facts).format(key=key, value=value) for value in values
    )
    question = rng.choice(phrases.several_questions).format(key=key)
    answer = f"The values are {_joined(values)}."
    return Exercise("multi_value", facts, (Turn(question, answer, values),))


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
    return Exercise("variable_tracking", tuple(_interleaved(rng, lines)), (turn,))


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
    return Exercise("long_copy", facts, (turn,))


def lookup(rng: random.Random, records: Sequence[Record], *, num_questions: int = 1) -> Exercise:
    """What a reference work says of several subjects; each question asks about one."""
    asked = rng.sample(records, min(num_questions, len(records)))
    turns = tuple(Turn(record.question, record.answer, (record.value,)) for record in asked)
    return Exercise("lookup", tuple(record.fact for record in records), turns)


KINDS: dict[str, Callable[..., Exercise]] = {
    "needle": needle,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "long_copy": long_copy,
}


def draw_value(rng: random.Random, phrases: Phrases) -> str:
    """A number of 4-8 digits, a word, two words, a city or person, or a hexadecimal id."""
    return rng.choice(_VALUES)(rng, phrases)


def _number(rng: random.Random, phrases: Phrases) -> str:
    digits = rng.choice((4, 5, 6, 7, 7, 7, 8))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _word(rng: random.Random, phrases: Phrases) -> str:
    return rng.choice(phrases.words)


def _two_words(rng: random.Random, phrases: Phrases) -> str:
    return "-".join(rng.sample(phrases.words, 2))


def _name(rng: random.Random, phrases: Phrases) -> str:
    return rng.choice([owner for owner in phrases.owners if not owner.startswith("the ")])


def _uuid(rng: random.Random, phrases: Phrases) -> str:
    digits = f"{rng.getrandbits(128):032x}"
    if rng.random() < 0.5:
        return digits[:8]
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# Numbers most often: they can be guessed from nothing else.
_VALUES: tuple[Callable[[random.Random, Phrases], str], ...] = (
    *(_number, _number, _number, _number),
    *(_word, _two_words, _name, _uuid),
)


def _key(rng: random.Random, phrases: Phrases) -> str:
    return f"{rng.choice(phrases.nouns)} of {rng.choice(phrases.owners)}"


def _turn(rng: random.Random, phrases: Phrases, key: str, value: str) -> Turn:
    question = rng.choice(phrases.questions).format(key=key)
    if rng.random() < 0.25:
        return Turn(question + _ONLY, value, (value,))
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
