"""Deep health: what probes say of an engine that freezes, thaws and dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal

import httpx
import msgspec
import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.errors import EngineDead
from nsa_serve.server import watchdog as watchdog_room
from nsa_serve.server.app import create_app
from nsa_serve.server.client import EngineClient
from nsa_serve.server.serve import WATCH_INTERVAL
from nsa_serve.server.settings import ServerSettings
from nsa_serve.server.watchdog import EngineState, Watchdog
from tests.scripted_engine import make_request
from tests.server_fakes import VOCAB, ByteTokenizer, FakeEngine


@contextlib.asynccontextmanager
async def watched(engine, patience=0.01, interval=0.0):
    watchdog = Watchdog(engine, patience)
    task = asyncio.create_task(watchdog.watch(interval))
    await asyncio.sleep(0)
    try:
        yield watchdog
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(watchdog, state):
    async with asyncio.timeout(10):
        while await watchdog.state() is not state:
            await asyncio.sleep(0.001)


def test_a_freeze_is_told_and_its_stacks_are_asked_for_once(caplog):
    async def scenario():
        engine = FakeEngine()
        async with watched(engine) as watchdog:
            for frozen in (True, False, True):
                engine.frozen = frozen
                await until(watchdog, EngineState.FROZEN if frozen else EngineState.OK)
                for _ in range(20):
                    await asyncio.sleep(0)
        return engine.num_dumps

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(scenario()) == 2
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" ")[2] for line in told] == ["has", "goes", "has"]


def test_a_watched_engine_is_not_waited_for():
    """A probe that gives up after a second must not time out on an engine in a long step."""

    class Busy(FakeEngine):
        async def ping(self, timeout):
            await asyncio.Event().wait()

    async def scenario():
        async with watched(Busy()) as watchdog:
            return await asyncio.wait_for(watchdog.state(), 1)

    assert asyncio.run(scenario()) is EngineState.OK


class Computing(FakeEngine):
    """An engine in a step that takes ``num_looks`` looks at its processor time, which it uses."""

    def __init__(self, num_looks, *, ends):
        super().__init__()
        self.answers = asyncio.Event()
        self.looks = 0
        self._num_looks = num_looks
        self._ends = ends

    def cpu_seconds(self):
        self.looks = min(self.looks + 1, self._num_looks)
        if self._ends and self.looks == self._num_looks:
            self.answers.set()
        return float(self.looks)

    async def ping(self, timeout):
        async with asyncio.timeout(timeout):
            await self.answers.wait()


def test_an_engine_that_computes_lives_and_one_that_stops_at_it_is_frozen():
    async def scenario():
        working, stopped = Computing(60, ends=True), Computing(60, ends=False)
        found = await asyncio.gather(*(Watchdog(e, 0.007).state() for e in (working, stopped)))
        return found, stopped.looks, stopped.num_dumps

    states, looks, num_dumps = asyncio.run(scenario())
    assert states == [EngineState.OK, EngineState.FROZEN]
    assert (looks, num_dumps) == (60, 1)


def test_an_engine_that_computes_again_lives_before_its_step_has_ended():
    class Stopped(Computing):
        """Uses no processor time until it is let go on."""

        goes_on = False

        def cpu_seconds(self):
            self.looks += self.goes_on
            return float(self.looks)

    async def scenario():
        engine = Stopped(0, ends=False)
        async with watched(engine, patience=0.007) as watchdog:
            await until(watchdog, EngineState.FROZEN)
            engine.goes_on = True
            await until(watchdog, EngineState.OK)
            return engine.answers.is_set(), engine.num_dumps

    assert asyncio.run(scenario()) == (False, 1)


def test_an_engine_that_computed_for_too_long_lives_again_when_it_answers(monkeypatch):
    """Not because it still computes: whoever asked now and then would never see it frozen."""
    monkeypatch.setattr(watchdog_room, "COMPUTE_SECONDS", 0.02)

    async def scenario():
        engine = Computing(10**9, ends=False)
        async with watched(engine, patience=0.007) as watchdog:
            await until(watchdog, EngineState.FROZEN)
            looks = engine.looks
            while engine.looks < looks + 30:
                assert await watchdog.state() is EngineState.FROZEN
                await asyncio.sleep(0)
            engine.answers.set()
            await until(watchdog, EngineState.OK)

    asyncio.run(scenario())


def test_how_long_computing_counts_as_life_follows_the_slowest_answer_of_late(monkeypatch):
    async def scenario():
        slow = Watchdog(Computing(30, ends=True), 0.007)
        before = slow.compute_limit
        await slow.state()
        monkeypatch.setattr(watchdog_room, "COMPUTE_SECONDS", 0.05)
        # So long that it would never end otherwise.
        endless = await Watchdog(Computing(10**9, ends=False), 0.007).state()
        return before, slow.compute_limit, endless

    before, after, endless = asyncio.run(scenario())
    assert before == 120
    assert after > 4 * 25 * 0.001  # of 29 looks a millisecond apart
    assert endless is EngineState.FROZEN


def test_the_watch_ends_with_the_engine():
    async def scenario():
        engine = FakeEngine()
        engine.dead = True
        watchdog = Watchdog(engine, 1.0)
        async with asyncio.timeout(10):
            await watchdog.watch(0.0)
        return await watchdog.state()

    assert asyncio.run(scenario()) is EngineState.DEAD


def test_a_freeze_is_known_within_ten_seconds():
    settings = ServerSettings(model_names=("m",), max_model_len=1, vocab_size=1)
    patience = settings.health_timeout
    assert max(WATCH_INTERVAL + patience, patience + patience / watchdog_room.NUM_LOOKS) < 10


@contextlib.asynccontextmanager
async def mock_engine(rate):
    """A mock engine in its process, and a client of a server over it."""
    engine = await EngineClient.start(EngineConfig.from_flags(mock_token_rate=rate))
    settings = ServerSettings(
        model_names=("mock",), max_model_len=8192, vocab_size=VOCAB, health_timeout=0.3
    )
    app = create_app(engine, ByteTokenizer(), settings)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield engine, client
    finally:
        await engine.aclose()
        app.state.services.workers.close()


async def _until_status(client, status):
    async with asyncio.timeout(20):
        while (await client.get("/health")).status_code != status:
            await asyncio.sleep(0.01)


def test_an_engine_that_is_stopped_or_stuck_is_unhealthy_and_shows_where_it_stands(capfd):
    """A step of the mock engine lasts as long as it is asked to: here, a thousand seconds."""
    written = ""

    async def until_written(text):
        nonlocal written
        async with asyncio.timeout(20):
            while text not in written:
                written += capfd.readouterr().err
                await asyncio.sleep(0.01)

    async def scenario():
        async with mock_engine(rate=1e-3) as (engine, client):
            assert engine.cpu_seconds() is None
            engine.engine = msgspec.structs.replace(engine.engine, device="cpu")
            assert engine.cpu_seconds() > 0
            await _until_status(client, 200)
            os.kill(engine._process.pid, signal.SIGSTOP)
            await _until_status(client, 503)
            ready = (await client.get("/ready")).json()
            os.kill(engine._process.pid, signal.SIGCONT)
            await _until_status(client, 200)
            await until_written("engine/loop.py")
            reading = asyncio.ensure_future(anext(engine.submit(make_request("a"))))
            await _until_status(client, 503)
            # In the step, and of all threads.
            await until_written("engine/mock.py")
            assert "_leave_with_server" in written
            os.kill(engine._process.pid, signal.SIGKILL)
            with pytest.raises(EngineDead):
                await reading
            await engine.died()
            assert engine.cpu_seconds() is None
            return ready, (await client.get("/health")).json()

    assert asyncio.run(scenario()) == ({"status": "frozen"}, {"status": "dead"})
