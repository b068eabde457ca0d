"""Small engines with a tier of a few pages or without, and what is asked of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.request import EngineRequest, SamplingParams

BUDGET = 40
DEVICE, HOST = 660_000, 2 << 20


def build(folder: Path, **flags: Any) -> Engine:
    """An engine without a tokenizer over poisoned memory."""
    settings = {
        "model": str(folder), "random_weights": True, "device": "cpu", "max_num_seqs": 6,
        "dtype": "float32", "max_num_batched_tokens": BUDGET, **flags,
    }  # fmt: skip
    engine = Engine.from_config(EngineConfig.from_flags(**settings))
    runner: Any = engine._runner
    runner.pool.poison()
    if runner._runner.tier is not None:
        runner._runner.tier.host.poison()
    return engine


def tiered(folder: Path, **flags: Any) -> Engine:
    tier = {"kv_cache_memory_bytes": DEVICE, "kv_host_memory_bytes": HOST, "kv_runners_up": 4}
    return build(folder, **{**tier, **flags})


def make_requests(count: int, seed: int) -> list[EngineRequest]:
    """Prompts of mixed length, some of which begin alike."""
    draw = random.Random(seed)
    families = [[draw.randrange(96) for _ in range(400)] for _ in range(4)]
    requests = []
    for index in range(count):
        prompt = draw.choice(families)[: draw.randrange(1, 400)]
        prompt = prompt + [draw.randrange(96) for _ in range(draw.randrange(1, 90))]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=draw.randrange(1, 40), ignore_eos=True
        )
        requests.append(
            EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=sampling)
        )
    return requests


def run(
    engine: Engine,
    requests: list[EngineRequest],
    aborted: frozenset[str] = frozenset(),
    failed: dict[str, str] | None = None,
) -> dict[str, list[int]]:
    """Token ids by request, the books checked after every step; some end when half done.

    Errors go to ``failed``; without it there must be none.
    """
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting, now = list(requests), 0.0
    while waiting or engine.has_work:
        while waiting and len(engine._live) < 10:
            engine.add(waiting.pop(0), now)
        for output in engine.step(now):
            outputs[output.request_id].extend(output.token_ids)
            if output.error is not None:
                assert failed is not None, output.error
                failed[output.request_id] = output.error
            if output.request_id in aborted and len(outputs[output.request_id]) > 5:
                engine.abort(output.request_id, now)
        engine.check()
        now += 1.0
    return outputs


class Breaking:
    """A call that is broken off now and then: before it does anything, or when it is done."""

    def __init__(self, call: Callable[..., Any], error: BaseException, every: int) -> None:
        self._call, self._error, self._every = call, error, every
        self._numbers = itertools.count(1)

    def __call__(self, *args: Any, **options: Any) -> Any:
        number = next(self._numbers)
        if number % (2 * self._every) == self._every:
            raise self._error
        found = self._call(*args, **options)
        if number % (2 * self._every) == 0:
            raise self._error
        return found
