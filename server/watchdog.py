"""Whether the engine lives: asked every few seconds, so that probes are answered at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import StrEnum

from ..errors import NSAServeError
from .ports import Engine

logger = logging.getLogger("nsa_serve")

NUM_LOOKS = 7  # at the engine's processor time while its patience lasts
# An engine that computes on a CPU is given this many seconds, or as many times its slowest answer
# of late: cores that others use too make any step long.
COMPUTE_SECONDS = 120.0
COMPUTE_FACTOR = 4.0
NUM_REMEMBERED = 64  # answers


class EngineState(StrEnum):
    OK = "ok"
    FROZEN = "frozen"  # its loop has not turned for as long as we are patient
    DEAD = "dead"


class Watchdog:
    """Knows the engine's state. ``patience``: seconds for a sign of life.

    That is a turn of the engine's loop or, of an engine that computes on the CPU, processor time:
    its step may be a long one, which a stopped or locked process doesn't go on with. For how long
    that counts follows from what its steps have taken.
    """

    def __init__(self, engine: Engine, patience: float) -> None:
        self._engine = engine
        self._patience = patience
        self._known = EngineState.OK
        self._watching = False
        self._overdue = False  # it computed for longer than any step takes
        self._answered_in: deque[float] = deque(maxlen=NUM_REMEMBERED)  # seconds

    async def watch(self, interval: float) -> None:
        """Ask every ``interval`` seconds until the engine is dead: a freeze is known after at most
        ``interval`` and the patience, or the patience and one look more.
        """
        self._watching = True
        try:
            while await self._ask() is not EngineState.DEAD:
                await asyncio.sleep(interval)
        finally:
            self._watching = False

    async def state(self) -> EngineState:
        """As of the last question; where nobody watches, it is asked now."""
        return self._known if self._watching else await self._ask()

    @property
    def compute_limit(self) -> float:
        """Seconds after which an engine that computes counts as frozen too."""
        return max(COMPUTE_SECONDS, COMPUTE_FACTOR * max(self._answered_in, default=0.0))

    async def _ask(self) -> EngineState:
        loop = asyncio.get_running_loop()
        start = loop.time()
        state = await self._answer()
        seconds = loop.time() - start
        if state is EngineState.OK:
            self._answered_in.append(seconds)
        self._become(state, seconds)
        return state

    def _become(self, state: EngineState, seconds: float = 0.0) -> None:
        before, self._known = self._known, state
        if state is EngineState.FROZEN and before is not EngineState.FROZEN:
            logger.error("the engine has not answered in %.1f s; its stacks follow", seconds)
            self._engine.dump_stacks()
        elif state is EngineState.OK and before is EngineState.FROZEN:
            logger.warning("the engine goes on")

    async def _answer(self) -> EngineState:
        asked = asyncio.ensure_future(self._engine.ping(self.compute_limit))
        try:
            await self._await_life(asked)
            if not asked.done():
                return EngineState.FROZEN
            asked.result()
        except TimeoutError:
            self._overdue = True
            return EngineState.FROZEN
        except NSAServeError:
            return EngineState.DEAD
        finally:
            asked.cancel()
        self._overdue = False
        return EngineState.OK

    async def _await_life(self, asked: asyncio.Future[None]) -> None:
        """Wait for the answer, for as long as there are signs of life."""
        quiet, spent = 0, self._engine.cpu_seconds()
        while quiet < NUM_LOOKS and not asked.done():
            await asyncio.wait((asked,), timeout=self._patience / NUM_LOOKS)
            before, spent = spent, self._engine.cpu_seconds()
            if self._overdue or before is None or spent is None or spent <= before:
                quiet += 1
                continue
            quiet = 0
            if not asked.done():
                self._become(EngineState.OK)
