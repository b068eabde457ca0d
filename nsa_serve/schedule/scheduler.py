"""Decides each step on the CPU: who runs, how many tokens, in which blocks; and what a step ended.

There is no prefill and no decode: a request's ``num_computed`` catches up with its
``num_tokens`` under one token budget, and chunked prefill, prefix hits and resumption after
preemption all follow from that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from ..cache.manager import CacheManager
from ..config import ScheduleConfig
from ..errors import NSAServeError
from ..request import (
    EngineRequest,
    FinishReason,
    Request,
    RequestStatus,
    TokenLogprob,
    TokenTrace,
)
from ..stats import EngineStats, StatsSnapshot
from .batcher import Batcher
from .draft import Draft
from .forecast import OutputLengths
from .plan import PromptLogprobs, SampledToken, ScheduledChunk, StepPlan, StepResult
from .roster import Roster

PAGE_LOST = "a page of this request's cache could not be copied; try it again"


class StepUpdate(msgspec.Struct, frozen=True):
    """What an applied step brought one request. ``finish_reason`` is set on the last one."""

    request: Request
    new_token_ids: list[int]
    logprob: TokenLogprob | None = None
    prompt_logprobs: PromptLogprobs | None = None  # the next piece; pieces never overlap
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the one of ``stop_token_ids`` that matched; None for eos
    error: str | None = None
    trace: TokenTrace | None = None


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    requests: list[Request]  # of the chunks; ids may have been given anew since
    is_whole: bool  # a long prompt has the step for itself
    since: float


class Scheduler:
    """Owner of all requests' states. Every accepted request ends exactly once.

    ``depth`` is how many steps may be launched and not yet applied when ``schedule`` is called.
    A request's blocks are given back only after the last launched step that uses them.
    ``lengths`` says how much requests are expected to grow; by default it is learned.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        cache: CacheManager,
        *,
        max_model_len: int,
        token_budget: int,
        eos_token_ids: frozenset[int],
        depth: int = 0,
        lengths: OutputLengths | None = None,
    ) -> None:
        assert token_budget > 0, f"a step needs a token, got a budget of {token_budget}"
        self.stats = EngineStats()
        self._cache = cache
        self._eos_token_ids = eos_token_ids
        self._depth = depth
        lengths = OutputLengths() if lengths is None else lengths
        self._roster = Roster(config, cache, max_model_len, self.stats, lengths)
        self._batcher = Batcher(self._roster, cache, token_budget, interactive=config.interactive)
        self._launched: deque[_Launched] = deque()
        self._next_step = 0
        self._last_applied = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a request hasn't ended or a launched step hasn't been applied."""
        return bool(self._roster.requests or self._launched)

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        return self._roster.num_waiting

    def add(self, request: EngineRequest, now: float) -> Request:
        """Accept a request into the queue. One with a grammar waits beside it for ``allow``.

        Raises ``InvalidParameter`` (empty prompt, id in use), ``PromptTooLong`` (more than the
        context, or than the whole cache, can hold) or ``Overloaded`` (the queue is full).
        """
        try:
            return self._roster.add(request, now)
        except NSAServeError:
            self.stats.num_rejected += 1
            raise

    def abort(self, request_id: str, now: float) -> Request | None:
        """End a request at once. None if it has ended already or never was."""
        return self.finish(request_id, FinishReason.ABORT, now)

    def finish(self, request_id: str, reason: FinishReason, now: float) -> Request | None:
        """End a request for a reason found outside, such as a stop string. None if it had ended."""
        request = self._roster.requests.get(request_id)
        if request is not None:
            self._roster.end(request, reason, now)
        return request

    def allow(self, request_id: str, mask: bytes) -> None:
        """The tokens that a request's grammar allows next; the first mask lets it queue."""
        request = self._roster.requests[request_id]
        assert not request.num_in_flight, "a mask for a token behind one that is in flight"
        request.mask, request.mask_position = mask, request.num_tokens
        self._roster.unhold(request)

    @property
    def awaits_pages(self) -> bool:
        """Whether pages of some request are being read from a shelf."""
        return len(self._roster.reads) > 0

    @property
    def _brings_pages(self) -> bool:
        """Whether the next step loads pages from a shelf."""
        shelving = self._cache.shelving
        return shelving is not None and bool(shelving.arriving)

    def rest(self) -> None:
        """Wait a moment for such pages: nothing else can be done."""
        self._roster.reads.rest()

    def overdue(self, now: float) -> list[Request]:
        """Requests whose time-out has passed, each returned once: ``finish`` them."""
        return self._roster.overdue(now)

    def reset_prefix_cache(self) -> None:
        """Forget all shared content. Requests that run go on, but publish nothing more."""
        self._roster.reads.forget()
        self._roster.queue.wake(self._cache.reset())

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run before the launched step is applied."""
        assert len(self._launched) <= self._depth, "apply a step before scheduling another"
        if self._launched and self._launched[-1].is_whole:
            return None  # who comes while it runs must get into the next one
        for request in self._roster.reads.take_ended():
            self._roster.unhold(request)
        draft = self._batcher.fill(self._next_step, now)
        # Pages on their way hold places on the device, perhaps all that the first request needs: a
        # step that computes nothing brings them.
        if draft.chunks or (self._brings_pages and not self._launched):
            return self._launch(draft, now)
        waits = self._roster.awaits_mask or self.awaits_pages
        assert self._launched or not self._roster.requests or waits, (
            "requests wait, but none can ever run"
        )
        return None

    def apply(self, result: StepResult, now: float) -> list[StepUpdate]:
        """Take in the oldest launched step: new tokens, endings, pages to publish or give back."""
        launched = self._launched.popleft()
        plan = launched.plan
        assert plan.step_id == result.step_id, f"step {plan.step_id} is due, not {result.step_id}"
        self.stats.tier = result.tier or self.stats.tier
        self.stats.stream = result.stream or self.stats.stream
        self.stats.disk = result.disk or self.stats.disk
        pieces = {piece.request_id: piece for piece in result.prompt_logprobs}
        tokens = iter(result.tokens)
        updates = self._fail_holders(result.lost_block_ids, now)
        for chunk, request in zip(plan.chunks, launched.requests, strict=True):
            token = next(tokens) if chunk.samples else None
            piece = pieces.get(request.request_id) if pieces else None
            update = self._apply_chunk(request, chunk, token, piece, now)
            if update is not None:
                updates.append(update)
        assert next(tokens, None) is None, "more tokens came than chunks sample"
        self._roster.release(plan.step_id)
        self._measure(launched, now)
        return updates

    def undo(self, step_id: int) -> None:
        """Take back the only launched step, which failed: its requests compute it once more.

        They go through the queue as if preempted, so that nothing of the failed step is read.
        """
        launched = self._launched.popleft()
        assert launched.plan.step_id == step_id, "another step is due"
        assert not self._launched, "a step was built on one that failed"
        for chunk, request in zip(launched.plan.chunks, launched.requests, strict=True):
            request.num_in_flight -= chunk.samples
            if request.status is RequestStatus.RUNNING:
                self._roster.preempt(request, request.num_computed)
        self._lose_arriving(launched.plan)
        self._roster.release(step_id)

    def _lose_arriving(self, plan: StepPlan) -> None:
        """Nobody may read the pages that a failed step was to load."""
        if not plan.arriving:
            return
        holders = self._cache.lose([page.block_id for page in plan.arriving])
        for request in [r for r in self._roster.running if r.index in holders]:
            self._roster.preempt(request, request.num_computed)

    def snapshot(self) -> StatsSnapshot:
        """All counters and gauges at this moment."""
        door = self._roster.door
        num_prefill_tokens, oldest_prefill = self._roster.prefill()
        return self.stats.snapshot(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_queued_tokens=door.queued_tokens,
            num_prefill_tokens=num_prefill_tokens,
            oldest_prefill=oldest_prefill,
            prefill_tokens_per_s=door.speed.tokens_per_s or 0.0,
            retry_after=door.retry_after(),
            num_blocks=self._cache.num_blocks,
            num_blocks_in_use=self._cache.num_in_use,
            num_blocks_cached=self._cache.num_cached,
            num_blocks_spilled=self._cache.residence.num_spilled,
        )

    def check(self) -> None:
        """The cache's books, each request in exactly one place, every token in flight awaited."""
        self._cache.check()
        self._roster.check()
        self._check_in_flight()

    def _check_in_flight(self) -> None:
        for request in self._roster.requests.values():
            in_flight = sum(
                chunk.samples
                for step in self._launched
                for chunk, owner in zip(step.plan.chunks, step.requests, strict=True)
                if owner is request
            )
            assert request.num_in_flight == in_flight, f"{request.request_id}: tokens in flight"

    def _measure(self, launched: _Launched, now: float) -> None:
        """Prompt tokens a second: of steps that compute some, and of all while somebody waits."""
        seconds = now - max(launched.since, self._last_applied)
        self._last_applied = now
        chunks = zip(launched.plan.chunks, launched.requests, strict=True)
        num_tokens = sum(chunk.num_tokens for chunk, r in chunks if chunk.start < r.num_prompt)
        if num_tokens or self.num_waiting:
            self._roster.door.speed.count(num_tokens, seconds)

    def _launch(self, draft: Draft, now: float) -> StepPlan:
        shelving = self._cache.shelving
        plan = StepPlan(
            draft.step_id,
            self._roster.take_freed_rows(),
            draft.started,
            draft.chunks,
            [] if shelving is None else shelving.take_departing(),
            self._cache.take_update(),
            [] if shelving is None else shelving.take_arriving(),
        )
        self._next_step += 1
        self._launched.append(_Launched(plan, draft.requests, draft.is_whole, now))
        self.stats.count_step(draft.budget - draft.left)
        return plan

    def _apply_chunk(
        self,
        request: Request,
        chunk: ScheduledChunk,
        token: SampledToken | None,
        piece: PromptLogprobs | None,
        now: float,
    ) -> StepUpdate | None:
        if token is not None:
            assert token.request_id == request.request_id, "tokens are out of the plan's order"
            request.num_in_flight -= 1
        if request.status is RequestStatus.FINISHED:
            return None
        if token is not None and token.error is not None:
            return self._fail(request, token.error, now)
        self._publish(request, chunk)
        if piece is not None:
            piece = self._new_piece(request, piece)
        if token is not None:
            return self._apply_token(request, token, piece, now)
        return None if piece is None else StepUpdate(request, [], None, piece)

    def _apply_token(
        self, request: Request, token: SampledToken, piece: PromptLogprobs | None, now: float
    ) -> StepUpdate:
        token_id = token.token_id
        request.output_token_ids.append(token_id)
        self.stats.generation_tokens += 1
        if len(request.output_token_ids) == 1:
            self.stats.count_prompt(request.num_prompt, request.num_cached)
        reason, stop_token_id = self._ending(request, token_id)
        if reason is not None:
            self._roster.end(request, reason, now)
        return StepUpdate(
            request, [token_id], token.logprob, piece, reason, stop_token_id, trace=token.trace
        )

    def _ending(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        sampling = request.sampling
        num_outputs = len(request.output_token_ids)
        if num_outputs > sampling.min_tokens:
            if token_id in self._eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, None
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
        if len(request.prompt_token_ids) + num_outputs >= request.limit:
            return FinishReason.LENGTH, None
        return None, None

    def _fail(self, request: Request, error: str, now: float) -> StepUpdate:
        self._cache.retract(request)
        self._roster.end(request, FinishReason.ERROR, now)
        return StepUpdate(request, [], finish_reason=FinishReason.ERROR, error=error)

    def _fail_holders(self, lost: list[int], now: float) -> list[StepUpdate]:
        """End the requests whose pages are lost, and forget those pages."""
        holders = self._cache.lose(lost) if lost else set()
        held = [r for r in self._roster.requests.values() if r.index in holders]
        return [self._fail(request, PAGE_LOST, now) for request in held]

    def _publish(self, request: Request, chunk: ScheduledChunk) -> None:
        size = self._cache.page_size
        stop = chunk.start + chunk.num_tokens
        if stop // size > chunk.start // size:
            self._roster.queue.wake(self._cache.publish(request, stop))

    def _new_piece(self, request: Request, piece: PromptLogprobs) -> PromptLogprobs | None:
        """What wasn't given before the request was preempted and computed its prompt again."""
        entries = piece.entries[max(0, request.prompt_logprobs_to - piece.start) :]
        if not entries:
            return None
        stop = piece.start + len(piece.entries)
        request.prompt_logprobs_to = stop
        return PromptLogprobs(piece.request_id, stop - len(entries), entries)
