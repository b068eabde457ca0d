"""Ordinary chats that the dense base answers itself, for a grown model to learn from.

Retrieval exercises alone teach short answers to everything. What the base says to ordinary
prompts, and how likely it finds every token of it, keeps the rest of what it knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TrainingFailed
from ..llm import LLM, RequestResult
from ..request import FinishReason, SamplingParams
from ..tokenizer import Tokenizer
from .prompts import Prompt
from .sequences import SYSTEM

MAX_ANSWER = 200  # tokens of the only answer
_MAX_OF_TWO = 120  # of each, where there are two
LONGEST = 448  # tokens of a dialogue
_SHORTEST_ANSWER = 2
_REPEATS = 3  # of one run of tokens in a row make a loop, if they are
_LOOP = 12  # tokens together
_DISTINCT = 0.5  # of an answer's runs of four tokens, or else it goes round without a period
_FEW_RUNS = 40  # are too few to tell
_END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Talk:
    """A dialogue as far as it has come."""

    tokens: tuple[int, ...]
    spoken: tuple[bool, ...]
    is_open: bool = True  # the last answer came to its end by itself

    def asked(self, ids: Sequence[int]) -> Talk:
        return Talk((*self.tokens, *ids), (*self.spoken, *[False] * len(ids)))

    def answered(self, ids: Sequence[int], *, is_open: bool) -> Talk:
        return Talk((*self.tokens, *ids), (*self.spoken, *[True] * len(ids)), is_open)


def hold_dialogues(llm: LLM, prompts: Sequence[Prompt], *, seed: int) -> list[Talk]:
    """``llm``'s answers to ``prompts``; those to second turns follow what it said to the first.

    Answers that loop are cut where the loop begins anew, or the dialogue is dropped. Raises
    ``TrainingFailed`` where the engine fails.
    """
    tokenizer = llm.tokenizer
    talks = [Talk((), ()).asked(opening(tokenizer, prompt)) for prompt in prompts]
    first = _answers(llm, talks, prompts, seed)
    again = [i for i, prompt in enumerate(prompts) if len(prompt.turns) > 1 and first[i].is_open]
    asked = [first[i].asked(follow_up(tokenizer, prompts[i].turns[1])) for i in again]
    second = _answers(llm, asked, [prompts[i] for i in again], seed + len(prompts))
    whole = dict(enumerate(first)) | dict(zip(again, second, strict=True))
    return [talk for talk in whole.values() if any(talk.spoken) and len(talk.tokens) <= LONGEST]


def opening(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids of a chat up to where its first answer begins."""
    messages = [{"role": "user", "content": prompt.turns[0]}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": prompt.system})
    ids = tokenizer.encode_chat(messages)
    if prompt.system is None or prompt.system:
        return ids
    # The template can't be told to leave its own out.
    own = tokenizer.encode(SYSTEM, add_special=False)
    return ids[len(own) :] if ids[: len(own)] == own else ids


def follow_up(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids from the end of an answer's turn to where the next answer begins."""
    turn = f"\n<|im_start|>user\n{text}{_END_OF_TURN}\n<|im_start|>assistant\n"
    return tokenizer.encode(turn, add_special=False)


def _answers(llm: LLM, talks: Sequence[Talk], prompts: Sequence[Prompt], seed: int) -> list[Talk]:
    sampling = [
        SamplingParams(
            temperature=prompt.temperature,
            seed=seed + at,
            max_tokens=MAX_ANSWER if len(prompt.turns) == 1 else _MAX_OF_TWO,
        )
        for at, prompt in enumerate(prompts)
    ]
    results = llm.generate([list(talk.tokens) for talk in talks], sampling, progress=True)
    return [_extended(talk, result) for talk, result in zip(talks, results, strict=True)]


def _extended(talk: Talk, result: RequestResult) -> Talk:
    if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise TrainingFailed(f"the base did not answer: {result.error}")
    said = result.token_ids
    kept = without_loop(said)
    ends = result.finish_reason is FinishReason.STOP and len(kept) == len(said)
    if len(kept) < _SHORTEST_ANSWER:
        return Talk(talk.tokens, (False,) * len(talk.tokens), is_open=False)
    return talk.answered(kept, is_open=ends)


def without_loop(ids: Sequence[int]) -> list[int]:
    """``ids`` up to the end of the first round of a loop; nothing where they circle in no period.

    A loop is one run of tokens ``_REPEATS`` times in a row, ``_LOOP`` tokens or more in all.
    """
    # Every loop has four tokens in a row that come as often as its rounds; most answers have none.
    if max(Counter(_runs_of_four(ids)).values(), default=0) < _REPEATS:
        return list(ids)
    kept = list(ids[: _first_round_ends(np.asarray(ids))])
    runs = _runs_of_four(kept)
    circles = len(set(runs)) < _DISTINCT * len(runs) and len(runs) >= _FEW_RUNS
    return [] if circles else kept


def _first_round_ends(tokens: NDArray[np.int64]) -> int:
    """Where the second round of the first loop begins, or the end of ``tokens``."""
    ends = [len(tokens)]
    for period in range(1, len(tokens) // _REPEATS + 1):
        # Equal to what stands a period before, for as long as a loop lasts.
        needed = max(period * (_REPEATS - 1), _LOOP - period)
        same = tokens[period:] == tokens[:-period]
        if len(same) >= needed:
            found = np.flatnonzero(np.convolve(same, np.ones(needed, int), "valid") == needed)
            ends += [int(found[0]) + period] if len(found) else []
    return min(ends)


def _runs_of_four(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(ids[at:] for at in range(4)), strict=False))


def summary(prompts: Sequence[Prompt], talks: Sequence[Talk]) -> dict[str, Any]:
    """Counts for who made them."""
    lengths = [len(talk.tokens) for talk in talks]
    return {
        "prompts": len(prompts),
        "dialogues": len(talks),
        "tokens": sum(lengths),
        "spoken": sum(sum(talk.spoken) for talk in talks),
        "longest": max(lengths, default=0),
    }
