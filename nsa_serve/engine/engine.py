"""The engine: sole owner of scheduler, cache, runner and outputs. One thread calls it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from ..cache.manager import CacheManager
from ..config import EngineConfig
from ..errors import RequestError
from ..models.loader import Progress
from ..request import EngineRequest, FinishReason, Request, RequestOutput
from ..runner.model_runner import NO_FINITE_LOGITS
from ..schedule.plan import SampledToken, StepPlan, StepResult
from ..schedule.scheduler import Scheduler, StepUpdate
from ..stats import CacheMap, StatsSnapshot
from ..tokenizer import Tokenizer
from .build import EngineParts, W, build_mock_parts, build_parts
from .checks import check_request
from .followers import Followers, Turn
from .messages import EngineDescription
from .output import OutputState

logger = logging.getLogger(__name__)

STEP_FAILED = "the step that computed this request failed; see the server's log"
OUT_OF_MEMORY = "the device has too little memory left for this request; try it again later"
TIMED_OUT = "the request was ended at its time-out of {:g} s, after {} tokens"
OUTPUT_FAILED = "the text of this request could not be made; see the server's log"


class PendingResult(Protocol):
    def result(self) -> StepResult: ...


class StepRunner(Protocol):
    """What runs plans: a worker, or a stand-in for it."""

    def launch(self, plan: StepPlan) -> PendingResult: ...


@dataclass(slots=True)
class _Live:
    """An accepted request that has not ended."""

    request: Request
    output: OutputState


@dataclass(slots=True)
class _Flight:
    """A scheduled step: launched, or failed at it while ``pending`` is None."""

    plan: StepPlan
    live: list[_Live | None]  # of the plan's chunks; an id may be given anew while it flies
    pending: PendingResult | None = None
    lacks_memory: bool = False  # it failed for want of memory, and so a smaller one may do


class Engine:
    """Requests in, outputs out; every accepted request ends with exactly one final output.

    ``depth`` steps are launched before the oldest is waited for: 0 where ``launch`` computes (a
    CPU), 1 where it queues (a GPU). A step that fails ends its own requests, and the engine goes
    on; where only memory was lacking it ends the newest ones, and the others compute it again.
    ``clock`` (seconds, monotonic) stamps tokens when they arrive. ``close`` ends the runner.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: CacheManager,
        runner: StepRunner,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        depth: int = 0,
        clock: Callable[[], float] = time.monotonic,
        description: EngineDescription | None = None,
        followers: Followers | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.description = description
        self._scheduler = scheduler
        self._cache = cache
        self._runner = runner
        self._vocab_size = vocab_size
        self._depth = depth
        self._clock = clock
        self._followers = followers
        self._live: dict[str, _Live] = {}
        self._flights: deque[_Flight] = deque()
        self._num_to_shed = 1  # requests that the next step without memory ends
        self._close = close

    @classmethod
    def from_config(cls, config: EngineConfig, on_progress: Progress | None = None) -> Self:
        """The engine that ``config`` asks for, its model loaded.

        Raises ``ConfigError`` or ``CheckpointError``.
        """
        if config.source.mock_token_rate is not None:
            return cls.of(build_mock_parts(config))
        return cls.of(build_parts(config, on_progress))

    @classmethod
    def of(cls, parts: EngineParts[W]) -> Self:
        """The engine of parts that are built."""
        return cls(
            parts.scheduler,
            parts.cache,
            parts.worker,
            parts.tokenizer,
            vocab_size=parts.description.vocab_size,
            depth=parts.depth,
            description=parts.description,
            followers=parts.followers,
            close=parts.worker.close,
        )

    def close(self) -> None:
        """Write down what is to outlast this process; nothing may be asked of it afterwards."""
        if self._close is not None:
            self._close()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: EngineRequest, now: float) -> None:
        """Accept a request. Raises ``RequestError`` or ``Overloaded`` where it can't be."""
        try:
            check_request(request, self._vocab_size, grammars=self._followers is not None)
        except RequestError:
            self._scheduler.stats.num_rejected += 1
            raise
        accepted = self._scheduler.add(request, now)
        output = OutputState(request, self.tokenizer, now)
        self._live[request.request_id] = _Live(accepted, output)
        grammar = request.sampling.grammar
        if grammar is not None and self._followers is not None:
            self._followers.open(request.request_id, grammar, now)

    def abort(self, request_id: str, now: float) -> RequestOutput | None:
        """End a request at once: its final output, or None if it has ended or never was."""
        live = self._live.get(request_id)
        return None if live is None else self._end(live, FinishReason.ABORT, now)

    def step(self, now: float) -> list[RequestOutput]:
        """End what is overdue, launch the next step and take in the oldest one that is due."""
        outputs = self._end_overdue(now) + self._take_turns(now)
        # More are out than the depth allows only where a step was interrupted (Ctrl-C).
        # Behind a failed launch nothing is scheduled: it would build on tokens that never come.
        plan = None
        if len(self._flights) <= self._depth and not self._has_failed_launch:
            plan = self._scheduler.schedule(now)
        if plan is not None:
            self._launch(plan)
        if self._flights and (plan is None or len(self._flights) > self._depth):
            return outputs + self._land()
        if plan is None:
            self._rest()
        return outputs

    def _rest(self) -> None:
        """Wait a moment for what others do: nothing can be launched."""
        if self._scheduler.awaits_pages:
            self._scheduler.rest()
        elif self._followers is not None:
            self._followers.rest()

    def _take_turns(self, now: float) -> list[RequestOutput]:
        """Pass on what grammars allow; end the requests whose text is complete or can't go on."""
        if self._followers is None:
            return []
        ended = [self._take_turn(turn, now) for turn in self._followers.turns(now)]
        return [output for output in ended if output is not None]

    def _take_turn(self, turn: Turn, now: float) -> RequestOutput | None:
        live = self._live[turn.request_id]
        if turn.error is not None:
            return self._end(
                live, FinishReason.ERROR, now, error=turn.error, error_param=turn.param
            )
        if turn.mask is None:
            return self._end(live, FinishReason.STOP, now)
        self._scheduler.allow(turn.request_id, turn.mask)
        return None

    def _end_overdue(self, now: float) -> list[RequestOutput]:
        """Final outputs of requests whose time-out has passed, whether they ran or waited."""
        return [
            self._end(
                self._live[request.request_id],
                FinishReason.TIMEOUT,
                now,
                error=TIMED_OUT.format(request.timeout, len(request.output_token_ids)),
            )
            for request in self._scheduler.overdue(now)
        ]

    @property
    def _has_failed_launch(self) -> bool:
        return bool(self._flights) and self._flights[-1].pending is None

    def stats(self) -> StatsSnapshot:
        return self._scheduler.snapshot()

    def cache_map(self) -> CacheMap:
        """Who holds each block, and which are not on the device. Takes time by their number."""
        return CacheMap(self._cache.holders(), self._cache.residence.spilled())

    def check(self) -> None:
        """Assert that the books are right: no block, row or request is lost or owned twice."""
        self._scheduler.check()
        assert self._scheduler.num_running + self._scheduler.num_waiting == len(self._live), (
            "the engine and its scheduler know different requests"
        )

    def _launch(self, plan: StepPlan) -> None:
        live = [self._live.get(chunk.request_id) for chunk in plan.chunks]
        flight = _Flight(plan, live)
        # Noted before the launch: the scheduler awaits this step's result whatever happens.
        self._flights.append(flight)
        try:
            flight.pending = self._runner.launch(plan)
        except torch.AcceleratorError:
            raise  # the device is lost, and with it every step to come
        except Exception as error:
            logger.exception("launching step %d failed", plan.step_id)
            flight.lacks_memory = is_out_of_memory(error)

    def _land(self) -> list[RequestOutput]:
        """Take in the oldest step."""
        flight = self._flights[0]
        result = self._result(flight)
        self._flights.popleft()
        now = self._clock()
        if flight.lacks_memory:
            return self._shed(flight, now)
        if result is None:
            outputs = self._fail_silent_chunks(flight, now)
            return outputs + self._apply(_failed(flight.plan), now)
        self._num_to_shed = 1
        return self._apply(result, now)

    def _apply(self, result: StepResult, now: float) -> list[RequestOutput]:
        updates = self._scheduler.apply(result, now)
        voids = sum(update.error == NO_FINITE_LOGITS for update in updates)
        self._scheduler.stats.num_void_logits += voids
        delivered = [self._deliver(update, now) for update in updates]
        return [output for output in delivered if output is not None]

    def _shed(self, flight: _Flight, now: float) -> list[RequestOutput]:
        """End the newest requests of a step that lacked memory; the others compute it again.

        Each such step in a row ends twice as many, so that a few tries are enough.
        """
        live = [one for one in flight.live if one is not None and not one.output.finished]
        live.sort(key=lambda one: one.request.index, reverse=True)
        outputs = [
            self._end(one, FinishReason.ERROR, now, error=OUT_OF_MEMORY)
            for one in live[: self._num_to_shed]
        ]
        self._num_to_shed *= 2
        self._scheduler.undo(flight.plan.step_id)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outputs

    def _result(self, flight: _Flight) -> StepResult | None:
        """The step's result, or None where it failed."""
        if flight.pending is None:
            return None
        try:
            return flight.pending.result()
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("step %d failed", flight.plan.step_id)
            return None

    def _fail_silent_chunks(self, flight: _Flight, now: float) -> list[RequestOutput]:
        """End the requests of a failed step that were to get no token from it.

        They end before the step is applied, so that what it computed of them is not published.
        """
        return [
            self._end(live, FinishReason.ERROR, now, error=STEP_FAILED)
            for chunk, live in zip(flight.plan.chunks, flight.live, strict=True)
            if not chunk.samples and live is not None and not live.output.finished
        ]

    def _deliver(self, update: StepUpdate, now: float) -> RequestOutput | None:
        live = self._live[update.request.request_id]
        try:
            return self._take_in(live, update, now)
        except Exception:
            logger.exception("the output of %s failed", live.output.request_id)
            return self._end(live, FinishReason.ERROR, now, error=OUTPUT_FAILED)

    def _take_in(self, live: _Live, update: StepUpdate, now: float) -> RequestOutput | None:
        stopped = _feed(live.output, update, now)
        if update.finish_reason is not None:
            return self._end(
                live,
                update.finish_reason,
                now,
                stop_reason=update.stop_token_id,
                error=update.error,
            )
        if stopped:
            return self._end(live, FinishReason.STOP, now)
        if live.request.awaits_mask and self._followers is not None:
            for token_id in update.new_token_ids:
                self._followers.advance(live.output.request_id, token_id, now)
        return live.output.take()

    def _end(
        self,
        live: _Live,
        reason: FinishReason,
        now: float,
        *,
        stop_reason: int | None = None,
        error: str | None = None,
        error_param: str | None = None,
    ) -> RequestOutput:
        """The final output. The scheduler is told, unless it was the one to say so."""
        self._scheduler.finish(live.output.request_id, reason, now)
        if self._followers is not None:
            self._followers.close(live.output.request_id)
        live.output.finish(reason, stop_reason=stop_reason, error=error, error_param=error_param)
        del self._live[live.output.request_id]
        final = live.output.take(
            num_cached=live.request.num_cached, first_scheduled=live.request.first_scheduled
        )
        assert final is not None, "a finished request always has a final output"
        return final


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step failed for want of memory. On the CPU torch says so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _failed(plan: StepPlan) -> StepResult:
    """The result of a step that gave none: every token is void."""
    tokens = [
        SampledToken(chunk.request_id, -1, error=STEP_FAILED)
        for chunk in plan.chunks
        if chunk.samples
    ]
    # It may not have come to loading pages.
    lost = [page.block_id for page in plan.arriving]
    return StepResult(plan.step_id, tokens, lost_block_ids=lost)


def _feed(output: OutputState, update: StepUpdate, now: float) -> bool:
    """Give a request what the step brought it; true where a stop string is complete."""
    piece = update.prompt_logprobs
    if piece is not None:
        output.add_prompt_logprobs(piece.start, piece.entries)
    if update.trace is not None:
        output.add_trace(update.trace)
    ends = update.finish_reason is FinishReason.STOP
    for token_id in update.new_token_ids:
        if output.add_token(token_id, update.logprob, now, ends=ends):
            return True
    return False
