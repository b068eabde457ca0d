"""Ordinary prompts of a chat, drawn from wordings and words.

None of those that judge it, and none whose right answer training has from a table.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter

from ..errors import ConfigError
from ..tokenizer import Tokenizer
from .corpus import END_OF_TEXT, Corpus, Tokens
from .held_out_prompts import is_held_out
from .known_answers import listed_questions
from .prompt_templates import FOLLOW_UPS, TEMPLATES
from .prompt_words import WORDS

_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9,;' -]+[.?!]")
_WORDS_OF_A_SENTENCE = (6, 25)
_TOKENS_READ = 40_000  # of each source, for sentences
_FEW = ("two", "three", "four", "five")
_TWO_TURNS = 0.25
_DEFAULT_SYSTEM, _NO_SYSTEM = 0.65, 0.20  # the rest has one of ``WORDS["role"]``
_GREEDY = 0.5
_TEMPERATURE = 0.7
_TRIES = 50  # draws for one new prompt
_DRAWS = 4  # of a word, for one that the prompt does not hold yet


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says, and how it is answered."""

    turns: tuple[str, ...]  # one or two
    system: str | None  # None: the chat template's own; "": none at all
    temperature: float


def read_topics(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, tuple[str, ...]]:
    """Words by their place in a template: the written ones, and the corpus's own.

    Countries and nouns come from its records where it has any, sentences from the beginning of
    each source. Raises ``ConfigError`` where no source has a plain sentence.
    """
    sentences = _unique(s for own in corpus.sources.values() for s in _sentences(own, tokenizer))
    if not sentences:
        raise ConfigError("no source of the corpus has a plain sentence of 6 to 25 words")
    nouns = _unique(noun for noun in _subjects(corpus, "gloss") if noun.isalpha())
    return {
        **WORDS,
        "country": _unique(_subjects(corpus, "country")) or WORDS["city"],
        "noun": _unique(noun for noun in nouns if noun.islower()) or WORDS["object"],
        "sentence": sentences,
    }


def draw_prompt(rng: random.Random, topics: Mapping[str, tuple[str, ...]]) -> Prompt:
    """A prompt of any kind, each kind as often, that touches no held-out one."""
    templates = TEMPLATES[rng.choice(list(TEMPLATES))]
    turns = [_turn(rng, templates, topics)]
    if rng.random() < _TWO_TURNS:
        turns.append(_turn(rng, FOLLOW_UPS, topics))
    temperature = 0.0 if rng.random() < _GREEDY else _TEMPERATURE
    return Prompt(tuple(turns), _system(rng, topics), temperature)


def draw_prompts(
    seed: int, count: int, topics: Mapping[str, tuple[str, ...]]
) -> tuple[Prompt, ...]:
    """``count`` prompts, no two with the same words. Raises ``ConfigError`` for too many."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], Prompt] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        prompt = draw_prompt(rng, topics)
        found.setdefault(prompt.turns, prompt)
    if len(found) < count:
        raise ConfigError(f"--count {count}: the templates give no more than {len(found)} prompts")
    return tuple(found.values())


def _system(rng: random.Random, topics: Mapping[str, tuple[str, ...]]) -> str | None:
    kind = rng.random()
    if kind < _DEFAULT_SYSTEM:
        return None
    return "" if kind < _DEFAULT_SYSTEM + _NO_SYSTEM else rng.choice(topics["role"])


def _turn(
    rng: random.Random, templates: tuple[str, ...], topics: Mapping[str, tuple[str, ...]]
) -> str:
    while True:
        text = fill(rng, rng.choice(templates), topics)
        if not is_held_out(text) and text not in listed_questions():
            return text


def fill(rng: random.Random, template: str, topics: Mapping[str, tuple[str, ...]]) -> str:
    """``template`` with its places filled; no word twice if that can be helped."""
    drawn: dict[str, str] = {}
    for _, place, _, _ in Formatter().parse(template):
        if place is not None:
            name = place.rstrip("0123456789")
            words = [_word(rng, name, topics) for _ in range(_DRAWS)]
            fresh = (word for word in words if word not in drawn.values())
            drawn[place] = next(fresh, words[0])
    text = template.format(**drawn)
    return text[0].upper() + text[1:]


def _word(rng: random.Random, name: str, topics: Mapping[str, tuple[str, ...]]) -> str:
    match name:
        case "n":
            return str(rng.randrange(2, 100))
        case "big":
            return str(rng.randrange(100, 1000))
        case "few":
            return rng.choice(_FEW)
        case _:
            return rng.choice(topics[name])


def _subjects(corpus: Corpus, kind: str) -> list[str]:
    return [record.subject for record in corpus.records.get(kind, ())]


def _sentences(tokens: Tokens, tokenizer: Tokenizer) -> list[str]:
    """Sentences of plain letters, of a length that a user would type."""
    ids = [token for token in tokens[:_TOKENS_READ].tolist() if token != END_OF_TEXT]
    text = " ".join(tokenizer.decode(ids).split())
    shortest, longest = _WORDS_OF_A_SENTENCE
    found = (match[0] for match in _SENTENCE.finditer(text))
    return [sentence for sentence in found if shortest <= len(sentence.split()) <= longest]


def _unique(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
