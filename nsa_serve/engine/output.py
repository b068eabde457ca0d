"""From sampled tokens to what a client receives: text, stop strings, usage, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from ..request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    RequestTimes,
    TokenLogprob,
    TokenTrace,
    Usage,
)
from ..tokenizer import Tokenizer, detokenizer
from .stops import StopMatcher


class OutputState:
    """One request's output so far. ``take`` gives what is new; the last one is final.

    Without a tokenizer (random weights) there is no text, and stop strings never match.
    """

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer | None, arrival: float) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self._request = request
        self._arrival = arrival
        self._decoder = (
            detokenizer(
                tokenizer, request.prompt_token_ids, skip_special=sampling.skip_special_tokens
            )
            if tokenizer is not None
            else None
        )
        self._stops = StopMatcher(sampling.stop, include_stop=sampling.include_stop)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs = _prompt_slots(request)
        self._trace: list[TokenTrace] = []
        self._num_tokens = 0
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._reason: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._error: str | None = None
        self._error_param: str | None = None

    @property
    def finished(self) -> bool:
        return self._reason is not None

    def add_token(
        self,
        token_id: int,
        logprob: TokenLogprob | None,
        now: float,
        *,
        ends: bool = False,
    ) -> bool:
        """Take one sampled token; true where its text completed a stop string.

        ``ends`` says that the token itself (the model's end token, a stop token) ended the
        request: it is counted, but is no text unless ``include_stop`` asks for it.
        """
        assert not self.finished, f"{self.request_id}: a token after the end"
        self._num_tokens += 1
        self._first_token = now if self._first_token is None else self._first_token
        self._last_token = now
        self._token_ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._decoder is not None and (not ends or self._request.sampling.include_stop):
            self._add_text(self._decoder.feed([token_id]))
        return self._stops.matched is not None

    def add_prompt_logprobs(self, start: int, entries: Sequence[TokenLogprob]) -> None:
        """Log-probabilities of prompt tokens [start, start + len(entries))."""
        slots = self._prompt_logprobs
        assert slots is not None, f"{self.request_id} asked for no prompt logprobs"
        slots[start : start + len(entries)] = entries

    def add_trace(self, trace: TokenTrace) -> None:
        """What NSA read for the next token."""
        self._trace.append(trace)

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
        error_param: str | None = None,
    ) -> None:
        """End the request; a stop string in its text outranks ``reason``."""
        assert not self.finished, f"{self.request_id} ends twice"
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._release_text()
            if self._stops.matched is not None:
                reason, stop_reason = FinishReason.STOP, self._stops.matched
        self._reason, self._stop_reason = reason, stop_reason
        self._error, self._error_param = error, error_param

    def take(
        self, *, num_cached: int = 0, first_scheduled: float | None = None
    ) -> RequestOutput | None:
        """What is new since the last call; None where that is nothing, or the end is awaited.

        The arguments are of the request's account, and are read for the final output only.
        """
        if not self.finished and not (self._request.stream and self._token_ids):
            return None
        output = RequestOutput(
            request_id=self.request_id,
            text="".join(self._text),
            token_ids=self._token_ids,
            logprobs=self._logprobs if self._request.sampling.logprobs is not None else None,
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=self._reason,
            stop_reason=self._stop_reason,
            error=self._error,
            error_param=self._error_param,
            trace=self._trace if self.finished and self._trace else None,
            usage=self._usage(num_cached) if self.finished else None,
            times=self._times(first_scheduled) if self.finished else None,
        )
        self._text, self._token_ids, self._logprobs = [], [], []
        self._prompt_logprobs = None
        return output

    def _add_text(self, text: str) -> None:
        # Below min_tokens a stop string must not end the request, so its text passes unread.
        if self._num_tokens > self._request.sampling.min_tokens:
            text = self._stops.feed(text)
        if text:
            self._text.append(text)

    def _release_text(self) -> None:
        """Give out what was held back: a character or a stop string that will not be whole."""
        if self._decoder is not None and self._stops.matched is None:
            self._add_text(self._decoder.flush())
        self._text.append(self._stops.flush())

    def _usage(self, num_cached: int) -> Usage:
        return Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._num_tokens,
            cached_tokens=num_cached,
        )

    def _times(self, first_scheduled: float | None) -> RequestTimes:
        return RequestTimes(
            arrival=self._arrival,
            first_scheduled=first_scheduled,
            first_token=self._first_token,
            last_token=self._last_token,
        )


def _prompt_slots(request: EngineRequest) -> list[TokenLogprob | None] | None:
    """A slot for each prompt token, where asked for; the first token has no past and stays None."""
    if request.sampling.prompt_logprobs is None:
        return None
    return [None] * len(request.prompt_token_ids)
