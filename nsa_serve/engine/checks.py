"""Checks of a request at the engine's door, for every way in: the server's and ``LLM``'s."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import InvalidParameter
from ..request import MAX_LOGPROBS, EngineRequest, SamplingParams
from .grammar import check_grammar


def check_request(request: EngineRequest, vocab_size: int, *, grammars: bool = True) -> None:
    """Raise ``InvalidParameter`` with the field and its value where the runner could not use it.

    An id outside the vocabulary would fail the whole step, and everybody in it. ``grammars`` says
    whether this engine can follow one.
    """
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    check_sampling(request.sampling, vocab_size)
    grammar = request.sampling.grammar
    if grammar is None:
        return
    if not grammars:
        raise InvalidParameter(
            f"{grammar.param} is not supported here: it takes a model with a tokenizer and an end "
            "token",
            param=grammar.param,
        )
    check_grammar(grammar)


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise ``InvalidParameter`` for a value that means nothing."""
    s = sampling
    _need(0 <= s.temperature < math.inf, "temperature", s.temperature, "0 or more")
    _need(0 < s.top_p <= 1, "top_p", s.top_p, "more than 0 and at most 1")
    _need(s.top_k >= -1, "top_k", s.top_k, "at least 1, or 0 or -1 for all")
    _need(0 <= s.min_p <= 1, "min_p", s.min_p, "from 0 to 1")
    for name in ("presence_penalty", "frequency_penalty"):
        _need(-2 <= getattr(s, name) <= 2, name, getattr(s, name), "from -2 to 2")
    penalty = s.repetition_penalty
    _need(0 < penalty < math.inf, "repetition_penalty", penalty, "more than 0")
    _need(s.max_tokens >= 1, "max_tokens", s.max_tokens, "at least 1")
    _need(0 <= s.min_tokens <= s.max_tokens, "min_tokens", s.min_tokens, "from 0 to max_tokens")
    _need(s.seed is None or -(1 << 63) <= s.seed < 1 << 63, "seed", s.seed, "a 64-bit integer")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(s, name)
        wanted = f"from 0 to {MAX_LOGPROBS}"
        _need(value is None or 0 <= value <= MAX_LOGPROBS, name, value, wanted)
    _check_ids("stop_token_ids", s.stop_token_ids, vocab_size)
    _check_ids("logit_bias", s.logit_bias, vocab_size)
    _need(all(s.bad_words), "bad_words", "an empty one", "sequences of token ids")
    _check_ids("bad_words", [i for word in s.bad_words for i in word], vocab_size)
    for bias in s.logit_bias.values():
        _need(-100 <= bias <= 100, "logit_bias", bias, "from -100 to 100")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    low, high = min(ids, default=0), max(ids, default=0)
    _need(low >= 0, name, low, f"token ids from 0 to {vocab_size - 1}")
    _need(high < vocab_size, name, high, f"token ids from 0 to {vocab_size - 1}")


def _need(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise InvalidParameter(f"{name} must be {wanted}, not {value}", param=name)
