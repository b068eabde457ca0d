"""What is let into the queue: requests that can run at all, as many as the queue takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from ..cache.manager import CacheManager
from ..config import ScheduleConfig
from ..errors import InvalidParameter, Overloaded, PromptTooLong
from ..request import EngineRequest, Request
from .speed import PrefillSpeed

MAX_RETRY_AFTER = 60  # seconds


class Door:
    """Checks requests at entry and counts the prompt tokens that wait."""

    def __init__(self, config: ScheduleConfig, cache: CacheManager, max_model_len: int) -> None:
        self.speed = PrefillSpeed()
        self.queued_tokens = 0
        self._config = config
        self._cache = cache
        self._max_model_len = max_model_len

    def check(self, request: EngineRequest, taken_ids: Collection[str], num_waiting: int) -> None:
        """Raise ``InvalidParameter``, ``PromptTooLong`` or ``Overloaded``, with the numbers."""
        if not request.prompt_token_ids:
            raise InvalidParameter("the prompt is empty; give at least one token", param="prompt")
        if request.sampling.max_tokens < 1:
            raise InvalidParameter("max_tokens must be at least 1", param="max_tokens")
        _check_seconds("timeout", request.timeout)
        _check_seconds("deadline", request.deadline)
        if request.request_id in taken_ids:
            raise InvalidParameter(
                f"a request with id {request.request_id!r:.80} is running already",
                param="request_id",
            )
        self._check_length(len(request.prompt_token_ids), request.sampling.max_tokens)
        self._check_queue(len(request.prompt_token_ids), num_waiting)

    def enter(self, request: Request) -> None:
        """A request waits, for the first time or again."""
        self.queued_tokens += request.num_prompt

    def leave(self, request: Request) -> None:
        self.queued_tokens -= request.num_prompt

    def retry_after(self, num_tokens: int = 0) -> int:
        """Seconds until ``num_tokens`` fewer wait, and half of the queue is gone at least.

        Half, so that there is room for all who are sent away together, and work until they come.
        """
        seconds = self.speed.seconds_for(max(num_tokens, self.queued_tokens / 2))
        if seconds is None:
            return 1
        return math.ceil(round(min(MAX_RETRY_AFTER, max(1.0, seconds)), 3))

    def check_queued(self, waiting: Iterable[Request]) -> None:
        assert self.queued_tokens == sum(r.num_prompt for r in waiting), "queued tokens leak"

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        total = num_prompt + max_tokens
        asked = f"{total} tokens ({num_prompt} in the prompt, {max_tokens} to generate)"
        if total > self._max_model_len:
            raise PromptTooLong(
                f"This model's maximum context length is {self._max_model_len} tokens. However, "
                f"this request asks for {asked}; shorten the prompt or lower max_tokens.",
                param="prompt" if num_prompt >= self._max_model_len else "max_tokens",
            )
        # The last token is never read again, so its K/V are not kept.
        need, size = self._cache.num_pages(total - 1), self._cache.page_size
        if need > self._cache.num_blocks:
            raise PromptTooLong(
                f"This server's cache holds {self._cache.num_blocks * size} tokens. However, "
                f"this request asks for {asked}; shorten the prompt or lower max_tokens.",
                param="prompt",
            )

    def _check_queue(self, num_prompt: int, num_waiting: int) -> None:
        limits = self._config
        excess = self.queued_tokens + num_prompt - limits.max_num_queued_tokens
        if num_waiting >= limits.max_num_queued_reqs:
            reason = f"{num_waiting} requests wait already"
        elif num_waiting and excess > 0:
            reason = f"requests with {self.queued_tokens} prompt tokens wait already"
        else:
            return
        seconds = self.retry_after(excess)
        raise Overloaded(
            f"The queue is full: {reason}; try again in {seconds} s.", retry_after=seconds
        )


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise InvalidParameter(f"{name} must be more than 0 seconds, not {value}", param=name)
