"""Where each request stands: it waits, runs in a row, or retires until its last step is applied."""

from __future__ import annotations

from bisect import bisect_left, insort

from ..cache.manager import CacheManager, Match
from ..config import ScheduleConfig
from ..request import EngineRequest, FinishReason, Request, RequestStatus
from ..stats import EngineStats
from .door import Door
from .forecast import OutputLengths
from .limits import TimeLimits
from .policy import ORDERS
from .queue import WaitingQueue
from .shelf_reads import ShelfReads


class Roster:
    """All requests that haven't ended, each in exactly one place; and the runner's rows.

    A request that leaves while a launched step still uses its blocks is *retiring*: they are
    given back when that step has been applied, and only then may it run again.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        cache: CacheManager,
        max_model_len: int,
        stats: EngineStats,
        lengths: OutputLengths,
    ) -> None:
        self.order = ORDERS[config.policy]
        self.requests: dict[str, Request] = {}
        self.queue = WaitingQueue(self.order)
        self.running: list[Request] = []  # in the policy's order
        self.retiring: list[Request] = []
        # By index: those whose grammar is being compiled, or whose pages are being read.
        self.held: dict[int, Request] = {}
        self.reads = ShelfReads(cache)
        self.door = Door(config, cache, max_model_len)
        self.lengths = lengths
        self.num_left = 0  # how often a request has stopped running
        self._time_limits = TimeLimits()
        self._timeout = config.request_timeout
        self._cache = cache
        self._stats = stats
        self._max_num_seqs = config.max_num_seqs
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []  # since the last plan
        self._next_index = 0
        self._applied = -1  # last applied step

    @property
    def is_full(self) -> bool:
        return len(self.running) >= self._max_num_seqs

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def prefill(self) -> tuple[int, float]:
        """Prompt tokens that those who run lack; the share computed of the oldest such prompt."""
        lacking = [r for r in self.running if r.num_computed < r.num_prompt]
        if not lacking:
            return 0, 0.0
        oldest = min(lacking, key=lambda request: request.index)
        num_tokens = sum(request.num_prompt - request.num_computed for request in lacking)
        return num_tokens, oldest.num_computed / oldest.num_prompt

    @property
    def awaits_mask(self) -> bool:
        """Whether some request waits for its grammar, and others perhaps for its blocks."""
        return any(request.awaits_mask for request in self.requests.values())

    def add(self, request: EngineRequest, now: float) -> Request:
        """Let a request into the queue; errors as of ``Door.check``."""
        self.door.check(request, self.requests.keys(), self.num_waiting)
        timeout = min(filter(None, (request.timeout, self._timeout)), default=None)
        accepted = Request(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            arrival=now,
            priority=request.priority,
            deadline=request.deadline or timeout,
            timeout=timeout,
            cache_salt=request.cache_salt,
            index=self._next_index,
            limit=len(request.prompt_token_ids) + request.sampling.max_tokens,
        )
        self._next_index += 1
        self.requests[accepted.request_id] = accepted
        self._cache.add(accepted)
        self._time_limits.add(accepted)
        self.door.enter(accepted)
        self.reads.begin(accepted)
        if accepted.awaits_mask or self.reads.awaits(accepted):
            self.held[accepted.index] = accepted
        else:
            self.queue.push(accepted)
        return accepted

    def unhold(self, request: Request) -> None:
        """A request that was held and lacks nothing more takes its place in the queue."""
        if request.awaits_mask or self.reads.awaits(request):
            return
        if self.held.pop(request.index, None) is not None:
            self.queue.push(request)

    def start(self, match: Match) -> Request:
        """The first in the queue runs; the pages of its match count as computed."""
        request = self.queue.pop()
        self._cache.allocate(request, match)
        self.door.leave(request)
        request.status = RequestStatus.RUNNING
        request.num_computed = len(match.block_ids) * self._cache.page_size
        insort(self.running, request, key=self.order)
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
            if self._cache.may_share(request):
                self._stats.count_lookup(request.num_prompt, request.num_cached)
        return request

    def behind(self, request: Request) -> list[Request]:
        """Those that run and stand behind a request that runs, in order."""
        place = bisect_left(self.running, self.order(request), key=self.order)
        return self.running[place + 1 :]

    def overdue(self, now: float) -> list[Request]:
        """Requests that have run out of time, each returned once; they are to be ended."""
        return self._time_limits.take_due(now, self.requests)

    def take_row(self, request: Request, now: float) -> int:
        """A row for a request's first chunk since it runs."""
        request.row = self._free_rows.pop()
        if request.first_scheduled is None:
            request.first_scheduled = now
        return request.row

    def take_freed_rows(self) -> list[int]:
        """Rows freed since the last call."""
        freed, self._freed_rows = self._freed_rows, []
        return freed

    def preempt(self, request: Request, num_lost: int) -> None:
        """Back into the queue. Tokens are kept; ``num_lost`` of them are to be computed again."""
        self._leave_running(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed = 0
        request.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._stats.num_lost_tokens += num_lost
        self.door.enter(request)
        self._retire(request)

    def end(self, request: Request, reason: FinishReason, now: float) -> None:
        """The request's one ending, wherever it stands."""
        del self.requests[request.request_id]
        status, request.status = request.status, RequestStatus.FINISHED
        request.finish_reason = reason
        self._stats.num_finished[reason] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS):
            self.lengths.record(request)
        if request.deadline is not None and now > request.arrival + request.deadline:
            self._stats.num_late += 1
        if status is RequestStatus.RUNNING:
            self._leave_running(request)
            self._retire(request)
            return
        self.door.leave(request)
        if self.held.pop(request.index, None) is not None:
            self._cache.remove(request)
        elif request.last_step <= self._applied:  # else it is retiring already
            self.queue.forget()
            self._cache.remove(request)

    def release(self, applied: int) -> None:
        """Steps up to this one are applied: blocks that only they used come back."""
        self._applied = applied
        retiring, self.retiring = self.retiring, []
        for request in retiring:
            self._retire(request)

    def check(self) -> None:
        """Each request is in one place, with its blocks; rows and queued tokens add up."""
        waiting = self.queue.live()
        held = self.held.values()
        places = [r.index for r in (*waiting, *held, *self.running, *self.retiring)]
        assert len(set(places)) == len(places), "a request is in two places"
        ended = {r.index for r in self.retiring if r.status is RequestStatus.FINISHED}
        live = {r.index for r in self.requests.values()}
        assert live | ended == set(places), "a request is lost, or has ended and is still here"
        assert self._cache.known() == set(places), "the cache knows other requests"
        assert self.running == sorted(self.running, key=self.order), "running is out of order"
        assert all(r.status is RequestStatus.RUNNING for r in self.running)
        assert not any(map(self._cache.num_held, waiting)), "one that waits holds blocks"
        assert all(map(self._cache.is_pending, self.queue.parked_on())), "awaited in vain"
        rows = [r.row for r in self.running if r.row is not None]
        assert sorted(rows + self._free_rows) == list(range(self._max_num_seqs)), "rows leak"
        not_running = (r for r in self.requests.values() if r.status is not RequestStatus.RUNNING)
        self.door.check_queued(not_running)

    def _leave_running(self, request: Request) -> None:
        self.num_left += 1
        place = bisect_left(self.running, self.order(request), key=self.order)
        assert self.running.pop(place) is request, f"{request.request_id} isn't running"
        if request.row is not None:
            self._free_rows.append(request.row)
            self._freed_rows.append(request.row)
            request.row = None
        self.queue.wake(self._cache.withdraw(request))

    def _retire(self, request: Request) -> None:
        """Give its blocks back now, or after the last launched step that uses them."""
        if request.last_step <= self._applied:
            self._vacate(request)
        else:
            self.retiring.append(request)

    def _vacate(self, request: Request) -> None:
        self._cache.free(request)
        if request.status is RequestStatus.FINISHED:
            self._cache.remove(request)
        else:
            self.queue.push(request)
