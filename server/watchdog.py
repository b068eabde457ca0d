"""Whether the engine lives: asked every few seconds, so that probes are answered at once."""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum

from ..errors import NSAServeError
from .ports import Engine

logger = logging.getLogger("nsa_serve")


class EngineState(StrEnum):
    OK = "ok"
    FROZEN = "frozen"  # its loop has not turned for as long as we are patient
    DEAD = "dead"


class Watchdog:
    """Knows the engine's state. ``patience``: seconds for the engine's loop to turn once."""

    def __init__(self, engine: Engine, patience: float) -> None:
        self._engine = engine
        self._patience = patience
        self._known = EngineState.OK
        self._watching = False

    async def watch(self, interval: float) -> None:
        """Ask every ``interval`` seconds until the engine is dead: a freeze is known after at most
        ``interval`` and the patience.
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

    async def _ask(self) -> EngineState:
        before, self._known = self._known, await self._answer()
        if self._known is EngineState.FROZEN and before is not EngineState.FROZEN:
            self._tell_frozen()
        elif self._known is EngineState.OK and before is EngineState.FROZEN:
            logger.warning("the engine answers again")
        return self._known

    async def _answer(self) -> EngineState:
        try:
            await self._engine.ping(self._patience)
        except TimeoutError:
            return EngineState.FROZEN
        except NSAServeError:
            return EngineState.DEAD
        return EngineState.OK

    def _tell_frozen(self) -> None:
        logger.error("the engine has not answered in %g s; its stacks follow", self._patience)
        self._engine.dump_stacks()
