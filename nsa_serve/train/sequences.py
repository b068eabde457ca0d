"""Training sequences: plain text, or a chat over a long text in which facts are hidden."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tokenizer import Tokenizer
from .corpus import END_OF_TEXT, Corpus, Tokens
from .known_answers import draw_known
from .tasks import (
    Exercise,
    Turn,
    long_copy,
    lookup,
    multi_key,
    multi_value,
    needle,
    needle_among_alike,
)
from .tasks import variable_tracking as variables

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
# What the loss takes a token for: nothing (but what a teacher says of it), text, the answer of an
# exercise, or what the teacher itself said; padding is not learnt at all.
PADDING, UNUSED, TEXT, ANSWER, SPOKEN = -1, 0, 1, 2, 3
_TOKENS_OF_A_TURN = 1024  # of the text, for each question about it
_MAX_TURNS = 48
_MAX_ALIKE = 8
_FEW_PLACES = 8  # between sentences, too few for facts
_PASSAGE = (40, 160)  # tokens of a passage to copy
_WITHOUT_SYSTEM = 0.2
_KNOWN_TURNS = (1, 1, 2, 3)
_LONG = 16_384
# Facts of long sequences: so many lie in this part of the text, far from the questions.
_FAR_SHARE, _FAR = 0.6, (0.03, 0.5)


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """``tokens`` [L] and what each one is as a target, ``kinds`` [L]."""

    tokens: Tokens
    kinds: NDArray[np.int8]


class SequenceWriter:
    """Draws sequences of a wanted length. The same ``rng`` state gives the same sequence."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, text_share: float = 0.35) -> None:
        """``text_share`` of the sequences are plain text, a third of it of the longest ones."""
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.text_share = text_share
        self._names = list(corpus.sources)
        # Square roots: large sources more often than small ones, but not in proportion.
        self._weights = [tokens.size**0.5 for tokens in corpus.sources.values()]
        self._ends, self._spaced = _sentence_ends(tokenizer)

    def draw(self, rng: random.Random, length: int) -> TrainingSequence:
        """A sequence of exactly ``length`` tokens."""
        # A long chat is mostly text as well, and a batch holds few long sequences.
        share = self.text_share if length <= _LONG else self.text_share / 3
        return self.text(rng, length) if rng.random() < share else self.chat(rng, length)

    def text(self, rng: random.Random, length: int) -> TrainingSequence:
        """Related documents, as they stand in their source."""
        tokens = np.concatenate([np.array([END_OF_TEXT], np.uint16), self._run(rng, length - 1)])
        return TrainingSequence(tokens, np.full(length, TEXT, np.int8))

    def chat(self, rng: random.Random, length: int) -> TrainingSequence:
        """Text with hidden facts as a user's first turn, then questions and answers."""
        exercises = self._exercises(rng, length)
        turns = [turn for exercise in exercises for turn in exercise.turns]
        rng.shuffle(turns)
        tail = [self._turn(turn, first=at == 0) for at, turn in enumerate(turns)]
        head = self._encode(("" if rng.random() < _WITHOUT_SYSTEM else SYSTEM) + _USER)
        facts = [[self._encode(f" {fact}") for fact in exercise.facts] for exercise in exercises]
        taken = len(head) + sum(len(part) for part, _ in tail)
        taken += sum(len(fact) for group in facts for fact in group)
        if length < taken + 16:
            return self.text(rng, length)
        body = self._hide(rng, self._run(rng, length - taken), facts)
        tokens = [np.array(head, np.uint16), body, *(np.array(ids, np.uint16) for ids, _ in tail)]
        kinds = [np.full(len(head), UNUSED, np.int8), np.full(len(body), TEXT, np.int8)]
        return TrainingSequence(
            np.concatenate(tokens), np.concatenate([*kinds, *(own for _, own in tail)])
        )

    def known(self, rng: random.Random) -> TrainingSequence:
        """A chat of short questions whose right answers are known."""
        head = self._encode("" if rng.random() < _WITHOUT_SYSTEM else SYSTEM)
        turns = [self._turn(draw_known(rng), first=False) for _ in range(rng.choice(_KNOWN_TURNS))]
        kinds = [np.full(len(head), UNUSED, np.int8), *(own for _, own in turns)]
        tokens = [*head, *(token for ids, _ in turns for token in ids)]
        return TrainingSequence(np.array(tokens, np.uint16), np.concatenate(kinds))

    def _exercises(self, rng: random.Random, length: int) -> list[Exercise]:
        most = min(_MAX_TURNS, 1 + length // _TOKENS_OF_A_TURN)
        least = most // 3 if length > _LONG else 1
        wanted = rng.randint(least, most)
        found: list[Exercise] = []
        told: set[str] = set()
        while sum(len(exercise.turns) for exercise in found) < wanted:
            exercise = self._exercise(rng, length)
            if told.isdisjoint(exercise.keys):
                found.append(exercise)
                told |= exercise.keys
        return found

    def _exercise(self, rng: random.Random, length: int) -> Exercise:
        many = 2 if length < 2048 else rng.randint(2, _MAX_ALIKE)
        kind = rng.random()
        if kind < 0.25:
            return needle(rng)
        if kind < 0.50:
            return needle_among_alike(rng, num_alike=many - 1)
        if kind < 0.68:
            return multi_key(rng, num_keys=many, num_questions=1 + rng.randrange(2))
        if kind < 0.78:
            return multi_value(rng, num_values=rng.randrange(2, 5))
        if kind < 0.86:
            return variables(rng, num_hops=rng.randrange(2, 5), num_chains=rng.randrange(1, 4))
        if kind < 0.92 and length >= 2048:
            return long_copy(rng, passages=[self._passage(rng) for _ in range(rng.randrange(1, 4))])
        records = self.corpus.records.get(rng.choice(list(self.corpus.records) or [""]), ())
        return lookup(rng, rng.sample(records, min(many, len(records)))) if records else needle(rng)

    def _passage(self, rng: random.Random) -> str:
        """Whole sentences, as far as the text has them."""
        run = self._run(rng, 3 * _PASSAGE[1])
        ends = np.flatnonzero(self._ends[run])
        start = int(ends[0]) + 1 if len(ends) and ends[0] < _PASSAGE[1] else 0
        later = ends[ends >= start + _PASSAGE[0]]
        stop = int(later[0]) + 1 if len(later) else start + _PASSAGE[1]
        stop = min(stop, start + _PASSAGE[1])
        return " ".join(self.tokenizer.decode(run[start:stop].tolist()).split())

    def _run(self, rng: random.Random, count: int) -> Tokens:
        """``count`` tokens of one source, from a random place on, round its end."""
        (name,) = rng.choices(self._names, self._weights)
        source = self.corpus.sources[name]
        start = rng.randrange(len(source))
        run = np.take(source, np.arange(start, start + count), mode="wrap")
        return run.astype(np.uint16)

    def _hide(self, rng: random.Random, text: Tokens, groups: list[list[list[int]]]) -> Tokens:
        """``text`` with each group's facts between sentences, in their order, at any depth."""
        places = self._places(text)
        placed: list[tuple[int, int, list[int]]] = []
        for group in groups:
            depths = sorted(_depth(rng, len(text)) for _ in group)
            for depth, fact in zip(depths, group, strict=True):
                at = int(places[min(int(depth * len(places)), len(places) - 1)])
                placed.append((at, len(placed), fact))
        pieces, before = [], 0
        for at, _, fact in sorted(placed):
            pieces += [text[before:at], np.array(fact, np.uint16)]
            before = at
        return np.concatenate([*pieces, text[before:]])

    def _places(self, text: Tokens) -> NDArray[np.int64]:
        """Where a sentence may be put in: after one and before the next, or else at line ends."""
        ends = self._ends[text]
        between = np.flatnonzero(ends[:-1] & self._spaced[text[1:]]) + 1
        if len(between) >= _FEW_PLACES:
            return between
        places = np.flatnonzero(ends) + 1
        return places if len(places) else np.arange(1, len(text) + 1)

    def _turn(self, turn: Turn, *, first: bool) -> tuple[list[int], NDArray[np.int8]]:
        asked = self._encode(("\n\n" if first else _USER) + turn.question + _ASSISTANT)
        answer = self._encode(turn.answer + "<|im_end|>")
        after = self._encode("\n")
        counts = ((len(asked), UNUSED), (len(answer), ANSWER), (len(after), UNUSED))
        kinds = [np.full(count, kind, np.int8) for count, kind in counts]
        return [*asked, *answer, *after], np.concatenate(kinds)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False)


def _depth(rng: random.Random, length: int) -> float:
    """Where in a text of ``length`` tokens a fact stands, 0 … 1."""
    if length > _LONG and rng.random() < _FAR_SHARE:
        return rng.uniform(*_FAR)
    return rng.random()


def _sentence_ends(tokenizer: Tokenizer) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of every token id: whether a sentence or a line ends with it; whether it begins a word."""
    ends = (".", "!", "?", '."', ".)", "\n", "\n\n")
    texts = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
    table = np.array([text.endswith(ends) and text.strip(" ") != "" for text in texts])
    table[END_OF_TEXT] = False
    return table, np.array([text.startswith(" ") for text in texts])


def lengths_of(rng: random.Random, longest: int, total: int, page: int) -> list[int]:
    """Lengths in whole pages from half of ``longest`` to ``longest`` that sum up to ``total``."""
    found, left = [], total
    while left > longest:
        length = page * rng.randint(max(1, longest // 2 // page), longest // page)
        # What is left must hold a sequence.
        length = min(length, left - page)
        found.append(length)
        left -= length
    return [*found, left]


def as_columns(sequences: Sequence[TrainingSequence]) -> tuple[Tokens, NDArray[np.int8]]:
    """All tokens and all kinds, end to end."""
    return (
        np.concatenate([sequence.tokens for sequence in sequences]),
        np.concatenate([sequence.kinds for sequence in sequences]),
    )
