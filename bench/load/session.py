"""One load test from its flags: find the model, make the texts, warm up, run, report."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .arrivals import Arrivals
from .console import watch
from .datasets import load_dataset
from .endpoint import Endpoint
from .flags import LoadFlags
from .gauges import Gauges, GaugeWatch
from .http import Clock, Connect, HTTPClient, reason_of
from .metrics import Measured, summary
from .outcome import Session
from .runner import LoadRunner
from .texts import LocalTokens, ServerTokens, Tokens

_GAUGE_SECONDS = 0.5
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What is the same for every run against one server."""

    flags: LoadFlags
    endpoint: Endpoint
    tokens: Tokens

    @property
    def client(self) -> HTTPClient:
        return self.endpoint.client

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, flags: LoadFlags, clock: Clock, connect: Connect | None
    ) -> AsyncIterator[LoadTest]:
        """Reach the server. Raises ``ConfigError`` for flags or a server that can't be used."""
        client = _client(flags, clock, connect)
        with contextlib.closing(client):
            model = await _first_model(client, flags)
            endpoint = Endpoint(
                client, model, clock, flags.path, flags.extra, flags.request_timeout
            )
            local = LocalTokens(flags.tokenizer) if flags.tokenizer else None
            yield cls(flags, endpoint, local or ServerTokens(client, model))

    async def sessions(self, *, count: int, seed: int) -> list[Session]:
        """``count`` requests of the dataset, drawn from ``seed``."""
        settings = replace(self.flags.dataset(), num_prompts=count, seed=seed)
        try:
            return await load_dataset(settings, self.tokens)
        except OSError as error:
            raise ConfigError(f"the server at {self.client.base_url} left: {error}") from None

    async def warm_up(self, count: int, seed: int) -> None:
        """Requests whose texts come in no run after them. Raises ``ConfigError`` if one fails."""
        if not count:
            return
        dataset = self.flags.dataset()
        sessions = await self.sessions(count=max(count, dataset.num_prefixes), seed=seed)
        runner = LoadRunner(self.endpoint, max_concurrency=self.flags.max_concurrency)
        measured = await runner.run(sessions[:count], [0.0] * len(sessions[:count]))
        if measured.failed:
            raise ConfigError(f"a warm-up request failed: {measured.failed[0].error}")
        if measured.interrupted:
            raise asyncio.CancelledError

    async def run(
        self, sessions: Sequence[Session], arrivals: Arrivals, *, show: bool
    ) -> tuple[Measured, list[Gauges]]:
        """Send the sessions as they arrive, watched by a person and by the server's gauges."""
        rng = random.Random(self.flags.seed)
        runner = LoadRunner(
            self.endpoint,
            max_concurrency=self.flags.max_concurrency,
            think_time=self.flags.conversation_think_time,
        )
        gauges = GaugeWatch(self.client, _GAUGE_SECONDS)
        beside = [asyncio.create_task(gauges.run())]
        if show:
            total = sum(len(session.turns) for session in sessions)
            beside.append(asyncio.create_task(watch(runner, total, self.endpoint.clock)))
        try:
            measured = await runner.run(sessions, arrivals.offsets(len(sessions), rng))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        return measured, gauges.seen

    def record(self, measured: Measured, arrivals: Arrivals) -> dict[str, Any]:
        """Conditions and figures of a run, under vLLM's keys."""
        flags = self.flags
        conditions = {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": flags.backend,
            "backend": flags.backend,
            "label": flags.label,
            "model_id": self.endpoint.model,
            "tokenizer_id": flags.tokenizer or self.endpoint.model,
            "num_prompts": flags.num_prompts,
            **flags.metadata_pairs,
            "request_rate": "inf" if math.isinf(arrivals.rate) else arrivals.rate,
            "burstiness": arrivals.burstiness,
            "max_concurrency": flags.max_concurrency,
        }
        if arrivals.ramp is not None:
            conditions["ramp_up_strategy"] = arrivals.ramp.value
            conditions["ramp_up_start_rps"] = arrivals.start_rate
            conditions["ramp_up_end_rps"] = arrivals.end_rate
        figures = summary(
            measured, metrics=flags.metrics, percentiles=flags.percentiles, goodput=flags.limits
        )
        return {**conditions, **figures}


def _client(flags: LoadFlags, clock: Clock, connect: Connect | None) -> HTTPClient:
    try:
        return HTTPClient(
            flags.url, flags.headers, clock=clock, connect=connect, verify=not flags.insecure
        )
    except ValueError as error:
        raise ConfigError(f"--base-url: {error}") from None


async def _first_model(client: HTTPClient, flags: LoadFlags) -> str:
    """``--model``, or the first that the server lists, once it is there."""
    deadline = client.clock() + flags.ready_check_timeout_sec
    while True:
        try:
            reply = await client.exchange("GET", "/v1/models")
            reason = reason_of(reply)
        except OSError as error:
            reply, reason = None, str(error)
        if reply is not None and reply.status == 200:
            return flags.model or _listed(reply.json())
        if client.clock() >= deadline:
            raise ConfigError(f"no server answers at {client.base_url}/v1/models ({reason})")
        await asyncio.sleep(_RETRY_SECONDS)


def _listed(models: Any) -> str:
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ConfigError("the server lists no model: give --model") from None


def result_path(flags: LoadFlags, model: str, rate: float) -> Path:
    """Where a run's JSON goes, in vLLM's naming."""
    if flags.result_filename:
        return flags.result_dir / flags.result_filename
    limit = f"-concurrency{flags.max_concurrency}" if flags.max_concurrency else ""
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{flags.label or flags.backend}-{rate:g}qps{limit}-{model.split('/')[-1]}-{now}.json"
    return flags.result_dir / name
