"""The server over an engine in the same process, so that a test can reach into the model."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from nsa_serve.engine.engine import Engine
from nsa_serve.request import EngineRequest, RequestOutput
from nsa_serve.server.output_stream import Sink
from nsa_serve.stats import StatsSnapshot


class InProcessEngine:
    """What the server asks of an engine, one request at a time, stepped where it is awaited."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def submit(
        self, request: EngineRequest, sink: Sink | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        self._engine.add(request, time.monotonic())
        while self._engine.has_work:
            for output in self._engine.step(time.monotonic()):
                yield output
        self._engine.check()

    async def ping(self, timeout: float) -> None:
        return

    def cpu_seconds(self) -> float | None:
        return None

    def dump_stacks(self) -> None:
        return

    async def stats(self) -> StatsSnapshot:
        return self._engine.stats()
