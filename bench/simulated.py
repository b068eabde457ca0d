"""The real scheduler and cache over a device that only takes time: hours of load in seconds.

Time is a number that steps add to. A step's duration comes from a cost model fitted to measured
figures; what is simulated besides is that requests end, and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..cache.manager import CacheManager
from ..config import Policy, ScheduleConfig
from ..request import EngineRequest, SamplingParams
from ..schedule.forecast import OutputLengths
from ..schedule.plan import SampledToken, ScheduledChunk, StepPlan, StepResult
from ..schedule.scheduler import Scheduler

_EOS, _TOKEN = 0, 1


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step: fixed, by row, by token of context read, by prompt token and its past."""

    step: float
    row: float
    context: float
    prompt: float
    past: float

    def of(self, plan: StepPlan) -> float:
        seconds = self.step
        for chunk in plan.chunks:
            if chunk.num_tokens == 1:
                seconds += self.row + self.context * chunk.start
            else:
                middle = chunk.start + chunk.num_tokens / 2
                seconds += chunk.num_tokens * (self.prompt + self.past * middle)
        return seconds


# The 8b shape on an H200, fitted to the table of docs/performance.md. It gives the first token of
# 8k tokens after 0.200 s (measured 0.195), of 64k after 1.82 (1.87), of 128k after 4.17 (4.21) and
# of 256k after 10.4 (10.3), and decode steps of 5.1 ms for 1 × 64k (5.38), 8.5 for 40 × 64k (8.27)
# and 9.4 for 256 × 1k (10.1).
H200_8B = StepCosts(step=5.0e-3, row=1.62e-5, context=1.1e-9, prompt=2.32e-5, past=1.22e-10)


@dataclass(frozen=True, slots=True)
class Came:
    """Tokens of a request that came at a moment, in seconds."""

    name: str
    num_tokens: int
    at: float
    ended: bool


@dataclass(slots=True)
class _Flight:
    plan: StepPlan
    ends: float


class SimulatedEngine:
    """Steps as ``Engine`` does, ``depth`` of them ahead, on a clock of its own."""

    def __init__(
        self,
        costs: StepCosts,
        *,
        num_blocks: int,
        page_size: int = 64,
        token_budget: int = 8192,
        max_num_seqs: int = 256,
        max_model_len: int = 262_272,
        depth: int = 1,
        policy: Policy = Policy.FCFS,
        lengths: OutputLengths | None = None,
    ) -> None:
        self.now = 0.0
        self.num_tokens = num_blocks * page_size
        self.cache = CacheManager(num_blocks, page_size)
        self.scheduler = Scheduler(
            ScheduleConfig(policy, max_num_seqs, max_num_queued_reqs=1 << 20),
            self.cache,
            max_model_len=max_model_len,
            token_budget=token_budget,
            eos_token_ids=frozenset({_EOS}),
            depth=depth,
            lengths=lengths,
        )
        self._costs = costs
        self._depth = depth
        self._free_at = 0.0  # when the device has done all that was launched
        self._flights: deque[_Flight] = deque()
        self._ends: dict[str, tuple[int, int]] = {}  # (prompt tokens, output tokens)
        self._next_token = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(
        self, name: str, num_prompt: int, length: int, *, max_tokens: int | None = None
    ) -> None:
        """A request that gives ``length`` tokens; known beforehand unless ``max_tokens`` is given.

        No two prompts share a page.
        """
        prompt = list(range(self._next_token, self._next_token + num_prompt))
        self._next_token += num_prompt
        self._ends[name] = num_prompt, length
        sampling = SamplingParams(
            max_tokens=max_tokens or length, ignore_eos=max_tokens is None, seed=0
        )
        request = EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
        self.scheduler.add(request, self.now)

    def turn(self) -> list[Came]:
        """Launch a step, and take in the oldest if it is due: time goes on to its end."""
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            self._free_at = max(self.now, self._free_at) + self._costs.of(plan)
            self._flights.append(_Flight(plan, self._free_at))
        if self._flights and (plan is None or len(self._flights) > self._depth):
            return self._land()
        return []

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.stats.num_preemptions

    def _land(self) -> list[Came]:
        flight = self._flights.popleft()
        self.now = max(self.now, flight.ends)
        tokens = [self._sample(chunk) for chunk in flight.plan.chunks if chunk.samples]
        updates = self.scheduler.apply(StepResult(flight.plan.step_id, tokens), self.now)
        return [
            Came(u.request.request_id, len(u.new_token_ids), self.now, u.finish_reason is not None)
            for u in updates
        ]

    def _sample(self, chunk: ScheduledChunk) -> SampledToken:
        num_prompt, length = self._ends[chunk.request_id]
        is_last = chunk.start + chunk.num_tokens - num_prompt + 1 >= length
        return SampledToken(chunk.request_id, _EOS if is_last else _TOKEN)
