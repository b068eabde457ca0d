"""Sends a load and waits for its end: arrivals, concurrency, conversations, interruption."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from .endpoint import Endpoint
from .metrics import Measured
from .outcome import Outcome, Session


class LoadRunner:
    """One run of sessions against one endpoint.

    ``max_concurrency`` limits requests under way. One that waits for its place is timed from when
    it is sent, as vLLM does.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_concurrency: int | None = None,
        think_time: float = 0.0,
    ) -> None:
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._think_time = think_time
        self._ended: list[Outcome] = []
        self._running: dict[int, Outcome] = {}
        self._num_tokens_ended = 0

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_failed(self) -> int:
        return sum(not outcome.success for outcome in self._ended)

    @property
    def num_tokens(self) -> int:
        """Chunks with tokens so far."""
        running = sum(len(outcome.token_times) for outcome in self._running.values())
        return self._num_tokens_ended + running

    async def run(self, sessions: Sequence[Session], offsets: Sequence[float]) -> Measured:
        """Start each session at its offset in seconds, and wait for all.

        Cancelled, it ends what is under way and returns what was measured.
        """
        start = self._clock()
        tasks: list[asyncio.Task[None]] = []
        interrupted = False
        try:
            for session, offset in zip(sessions, offsets, strict=True):
                await self._sleep_until(start + offset)
                tasks.append(asyncio.create_task(self._converse(session, start + offset)))
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            interrupted = True
            await _cancel(tasks)
        duration = self._clock() - start
        return Measured(tuple(self._ended), start, duration, interrupted)

    async def _sleep_until(self, due: float) -> None:
        wait = due - self._clock()
        if wait > 0:
            await asyncio.sleep(wait)

    async def _converse(self, session: Session, due: float) -> None:
        answers: list[str] = []
        for number in range(len(session.turns)):
            if number:
                due = self._clock() + self._think_time
                await self._sleep_until(due)
            outcome = await self._ask(session, answers, due)
            if not outcome.success:
                return  # the turns after it would carry no answer to it
            answers.append(outcome.text)

    async def _ask(self, session: Session, answers: list[str], due: float) -> Outcome:
        async with self._places or contextlib.nullcontext():
            now = self._clock()
            # A request that waited for its place is not late.
            turn = session.turns[len(answers)]
            outcome = Outcome(turn, due=now if self._places else due, sent=now)
            self._running[id(outcome)] = outcome
            try:
                await self._endpoint.send(session, answers, outcome)
            finally:
                del self._running[id(outcome)]
        self._ended.append(outcome)
        self._num_tokens_ended += len(outcome.token_times)
        return outcome


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
