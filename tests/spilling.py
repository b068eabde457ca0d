"""Conversations of mixed length and caches so small that the pages of running requests spill."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from nsa_serve.cache.manager import CacheManager
from nsa_serve.config import EngineConfig
from nsa_serve.engine.tiers import near_pages, residence_sizes
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.checkpoint import resolve
from nsa_serve.request import EngineRequest, SamplingParams
from nsa_serve.runner.tier_sizes import size_tiers
from nsa_serve.runner.worker import served_model
from nsa_serve.schedule.plan import SampledToken, StepPlan, StepResult
from nsa_serve.schedule.scheduler import Scheduler

LONGEST = 6000
MAX_TOKENS = 24
# Sixteen requests of 2,000 tokens, 23 kB each in the embedded model, want 750 MB of raw pages.
STEPS = {"attention": "nsa", "max_num_batched_tokens": 4096, "max_num_seqs": 16}
TIGHT = {"kv_cache_memory_bytes": 500 << 20, "kv_host_memory_bytes": 1 << 30, "kv_runners_up": 4}
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


def conversations(count: int, longest: int = LONGEST) -> list[list[int]]:
    """Prompts of 64 to ``longest`` tokens, half of them short; every fifth goes on with another."""
    draw = random.Random(7)
    prompts: list[list[int]] = []
    for index in range(count):
        length = draw.randint(64, longest if draw.random() < 0.5 else longest // 4)
        before = draw.choice(prompts)[: 4 * length // 5] if index % 5 == 4 else []
        new = [draw.randrange(100, 49_000) for _ in range(length - len(before))]
        prompts.append(before + new)
    return prompts


@dataclass(slots=True)
class Spilling:
    """What a run without a model did to places."""

    steps: int = 0
    selectable_away: int = 0  # pages in host memory of decoding requests that choose, each step
    pages_out: int = 0
    pages_in: int = 0
    finished: int = 0


def simulate(prompts: list[list[int]], **flags: Any) -> Spilling:
    """Schedule ``prompts`` as an engine of the embedded model on a GPU would with these flags."""
    config = EngineConfig.from_flags(device="cpu", dtype="bfloat16", **flags)
    model = served_model(resolve(config.source), config)
    assert model.nsa is not None
    layout, budget = KVLayout.of(model, torch.bfloat16), flags["max_num_batched_tokens"]
    size = size_tiers(
        flags["kv_cache_memory_bytes"], flags["kv_host_memory_bytes"], layout, model.nsa.shape,
        max_num_seqs=flags["max_num_seqs"], token_budget=budget,
    )  # fmt: skip
    cache = CacheManager(
        size.num_blocks, layout.page, tiers=residence_sizes(size), near=near_pages(size)
    )
    scheduler = Scheduler(
        config.schedule, cache, max_model_len=model.max_position, token_budget=budget,
        eos_token_ids=frozenset(), depth=1,
    )  # fmt: skip
    for index, prompt in enumerate(prompts):
        request = EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=GREEDY)
        scheduler.add(request, 0.0)
    return _run(scheduler, cache, model.nsa.shape.dense_len)


def _run(scheduler: Scheduler, cache: CacheManager, dense_len: int) -> Spilling:
    found = Spilling()
    rows: dict[int, list[int]] = {}
    flights: list[StepPlan] = []
    while scheduler.has_work:
        plan = scheduler.schedule(float(found.steps))
        if plan is not None:
            flights.append(plan)
            _count(found, plan, cache, rows, dense_len)
        if plan is None or len(flights) > 1:
            updates = scheduler.apply(_any_result(flights.pop(0)), float(found.steps))
            found.finished += sum(update.finish_reason is not None for update in updates)
    return found


def _count(
    found: Spilling, plan: StepPlan, cache: CacheManager, rows: dict[int, list[int]], dense_len: int
) -> None:
    assert plan.residence is not None
    found.steps += 1
    found.pages_in += sum(move.to_device for move in plan.residence.moves)
    found.pages_out += sum(not move.to_device for move in plan.residence.moves)
    spilled = set(cache.residence.spilled())
    for start in plan.started:
        rows[start.row] = list(start.block_ids)
    for chunk in plan.chunks:
        rows[chunk.row] += chunk.new_block_ids
        if chunk.num_tokens == 1 and chunk.start >= dense_len:
            found.selectable_away += len(spilled.intersection(rows[chunk.row]))


def _any_result(plan: StepPlan) -> StepResult:
    tokens = [SampledToken(chunk.request_id, 7) for chunk in plan.chunks if chunk.samples]
    return StepResult(plan.step_id, tokens, [])
