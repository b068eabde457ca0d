"""A runner without a model: tokens are a function of the past, pages are dicts that remember.

It keeps what a real runner keeps (rows, block tables, K/V by block and offset) and checks what a
real one can't: that each K/V entry a chunk attends to was written, and for exactly these tokens.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from nsa_serve.cache.manager import CacheManager
from nsa_serve.config import Policy, ScheduleConfig
from nsa_serve.request import EngineRequest, FinishReason, Request, SamplingParams, TokenLogprob
from nsa_serve.schedule.forecast import OutputLengths
from nsa_serve.schedule.plan import PromptLogprobs, RowStart, SampledToken, StepPlan, StepResult
from nsa_serve.schedule.scheduler import Scheduler, StepUpdate

# Steps that are launched before the oldest is applied, as on a CPU and on a GPU.
DEPTHS = pytest.mark.parametrize("depth", [0, 1])
VOCAB = 50
EOS = 0


def _chain(past: bytes, token_id: int) -> bytes:
    return blake2b(past + token_id.to_bytes(4, "big"), digest_size=8).digest()


def past_of(token_ids: list[int]) -> bytes:
    """A digest of all tokens so far: what K/V at the last position depends on."""
    past = b""
    for token_id in token_ids:
        past = _chain(past, token_id)
    return past


def next_token(past: bytes, seed: int) -> int:
    return int.from_bytes(blake2b(past, digest_size=4, key=str(seed).encode()).digest()) % VOCAB


def run_alone(request: EngineRequest, seed: int) -> list[int]:
    """The output tokens that the request must give, whatever runs beside it."""
    sampling, outputs = request.sampling, []
    past = past_of(request.prompt_token_ids)
    while len(outputs) < sampling.max_tokens:
        token_id = next_token(past, seed)
        outputs.append(token_id)
        past = _chain(past, token_id)
        if len(outputs) > sampling.min_tokens:
            if token_id == EOS and not sampling.ignore_eos:
                break
            if token_id in sampling.stop_token_ids:
                break
    return outputs


def outputs_alone(prompt: list[int], seed: int = 7, **sampling) -> list[int]:
    """The same of a request with this prompt and these sampling settings."""
    return run_alone(make_request("alone", prompt, **sampling), seed)


@dataclass
class _Row:
    start: RowStart
    block_ids: list[int]
    sampled: dict[int, int] = field(default_factory=dict)  # position -> token, "on the device"


class FakeRunner:
    """Runs plans in the order they are launched, as a device's stream would."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.rows: dict[int, _Row] = {}
        self.written: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        self.plans: list[StepPlan] = []
        self.failing: set[str] = set()  # requests whose next token is an error
        self.num_computed_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for row in plan.freed_rows:
            del self.rows[row]
        for start in plan.started:
            assert start.row not in self.rows, f"row {start.row} is taken"
            self.rows[start.row] = _Row(start, list(start.block_ids))
        assert len({chunk.row for chunk in plan.chunks}) == len(plan.chunks)
        tokens, pieces = [], []
        writes: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        for chunk in plan.chunks:
            past, piece = self._compute(chunk, writes)
            if chunk.samples:
                tokens.append(self._sample(chunk, past))
            if piece is not None:
                pieces.append(piece)
        # Only now: no chunk may rely on what another one of its step writes.
        self.written.update(writes)
        self.num_computed_tokens += plan.num_tokens
        return StepResult(plan.step_id, tokens, pieces)

    def blocks_of(self, plan: StepPlan) -> set[int]:
        """Blocks that the chunks of a plan read or write."""
        return {block_id for chunk in plan.chunks for block_id in self.rows[chunk.row].block_ids}

    def _compute(self, chunk, writes) -> tuple[bytes, PromptLogprobs | None]:
        row = self.rows[chunk.row]
        assert row.start.request_id == chunk.request_id
        row.block_ids.extend(chunk.new_block_ids)
        stop = chunk.start + chunk.num_tokens
        assert len(row.block_ids) == -(-stop // self.page_size), "blocks and tokens disagree"
        past = self._read(row, chunk.start)
        token_ids = list(chunk.token_ids)
        for position in range(chunk.start + len(token_ids), stop):
            token_ids.append(row.sampled[position])
        for position, token_id in enumerate(token_ids, chunk.start):
            assert token_id == self._expected(row, position), f"token at {position} is wrong"
            past = _chain(past, token_id)
            place = self._place(row, position)
            assert place not in writes, f"two chunks of a step write {place}"
            writes[place] = token_id, position, past
        return past, self._prompt_logprobs(row, chunk.start, stop)

    def _read(self, row: _Row, num_tokens: int) -> bytes:
        """Every earlier entry of the row was written, and for this very past."""
        past = b""
        for position in range(num_tokens):
            entry = self.written.get(self._place(row, position))
            past = _chain(past, self._expected(row, position))
            expected = self._expected(row, position), position, past
            assert entry == expected, f"{row.start.request_id}: foreign K/V at {position}"
        return past

    def _place(self, row: _Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.page_size], position % self.page_size

    def _expected(self, row: _Row, position: int) -> int:
        prompt, outputs = row.start.prompt_token_ids, row.start.output_token_ids
        if position < len(prompt):
            return prompt[position]
        if position < len(prompt) + len(outputs):
            return outputs[position - len(prompt)]
        return row.sampled[position]

    def _sample(self, chunk, past: bytes) -> SampledToken:
        row = self.rows[chunk.row]
        if chunk.request_id in self.failing:
            row.sampled[chunk.start + chunk.num_tokens] = 1
            return SampledToken(chunk.request_id, 1, error="logits are NaN")
        token_id = next_token(past, row.start.seed)
        row.sampled[chunk.start + chunk.num_tokens] = token_id
        return SampledToken(chunk.request_id, token_id)

    def _prompt_logprobs(self, row: _Row, start: int, stop: int) -> PromptLogprobs | None:
        if row.start.sampling.prompt_logprobs is None:
            return None
        prompt = row.start.prompt_token_ids
        entries = [
            TokenLogprob(prompt[position], -float(position), 1, [])
            for position in range(start + 1, min(stop + 1, len(prompt)))
        ]
        return PromptLogprobs(row.start.request_id, start + 1, entries) if entries else None


def draw_prompt(draw: random.Random) -> list[int]:
    """Few families of prompts, so that prefixes are shared, cut short and prolonged."""
    family = draw.randrange(3)
    prompt = [family * 10 + i % 7 + 1 for i in range(draw.randrange(1, 40))]
    return prompt + [draw.randrange(1, 50) for _ in range(draw.choice([0, 0, 1, 3]))]


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    priority: int = 0,
    deadline: float | None = None,
    timeout: float | None = None,
    salt: str = "",
    **sampling,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),
        priority=priority,
        deadline=deadline,
        timeout=timeout,
        cache_salt=salt,
    )


class NothingExpected(OutputLengths):
    """Lets in whatever fits now, so that requests outgrow the cache."""

    def remaining(self, request: Request) -> int:
        return 0


class Harness:
    """A scheduler and a fake runner under a fake clock, every invariant checked after each step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        page_size: int = 4,
        budget: int = 32,
        depth: int = 0,
        max_num_seqs: int = 8,
        max_model_len: int = 256,
        policy: Policy = Policy.FCFS,
        prefix_caching: bool = True,
        far_sighted: bool = True,
        **limits: float,
    ) -> None:
        self.cache = self.make_cache(num_blocks, page_size, prefix_caching)
        self.scheduler = Scheduler(
            ScheduleConfig(policy=policy, max_num_seqs=max_num_seqs, **limits),
            self.cache,
            max_model_len=max_model_len,
            token_budget=budget,
            eos_token_ids=frozenset({EOS}),
            depth=depth,
            lengths=None if far_sighted else NothingExpected(),
        )
        self.runner = FakeRunner(page_size)
        self.budget, self.depth, self.now = budget, depth, 0.0
        self.unapplied: deque[tuple[StepResult, set[int]]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.updates: dict[str, list[StepUpdate]] = {}

    def make_cache(self, num_blocks: int, page_size: int, prefix_caching: bool) -> CacheManager:
        return CacheManager(num_blocks, page_size, enable_prefix_caching=prefix_caching)

    def add(self, request_id: str, prompt: list[int], **options):
        self.now += 1.0
        added = self.scheduler.add(make_request(request_id, prompt, **options), self.now)
        self.outputs[request_id], self.updates[request_id] = [], []
        return added

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check()
        if plan is None:
            return None
        assert plan.num_tokens <= self.budget
        taken = {block_id for chunk in plan.chunks for block_id in chunk.new_block_ids}
        for _, in_use in self.unapplied:
            assert not taken & in_use, "a block is given anew while a launched step uses it"
        result = self.runner.run(plan)
        self.unapplied.append((result, self.runner.blocks_of(plan)))
        return plan

    def apply(self) -> list[StepUpdate]:
        result, _ = self.unapplied.popleft()
        updates = self.scheduler.apply(result, self.now)
        self.scheduler.check()
        for update in updates:
            assert not self.is_ended(update.request.request_id), "an update after the last one"
            self.outputs[update.request.request_id].extend(update.new_token_ids)
            self.updates[update.request.request_id].append(update)
        return updates

    def end_overdue(self) -> list[Request]:
        """What the engine does before each step: end what has run out of time."""
        overdue = self.scheduler.overdue(self.now)
        for request in overdue:
            ended = self.scheduler.finish(request.request_id, FinishReason.TIMEOUT, self.now)
            assert ended is request
            self.scheduler.check()
        return overdue

    def is_ended(self, request_id: str) -> bool:
        updates = self.updates[request_id]
        return bool(updates) and updates[-1].finish_reason is not None

    def step(self) -> StepPlan | None:
        """Launch a step, then apply the oldest if more are out than the depth allows."""
        self.end_overdue()
        plan = self.launch()
        self.now += 1.0
        if self.unapplied and (plan is None or len(self.unapplied) > self.depth):
            self.apply()
        return plan

    def drain(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do; then nothing may be in use."""
        while self.scheduler.has_work:
            max_steps -= 1
            assert max_steps > 0, "the scheduler makes no progress"
            self.step()
        assert self.cache.num_in_use == 0
        assert not self.unapplied

    def reason(self, request_id: str):
        return self.updates[request_id][-1].finish_reason
