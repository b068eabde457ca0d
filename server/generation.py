"""The engine requests behind one HTTP request, and everything that can end them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from starlette.types import Receive

from ..errors import InvalidParameter, NSAServeError, RequestTimeout, StepFailed
from ..request import EngineRequest, FinishReason, RequestOutput
from .admission import Admission
from .ports import Engine
from .prometheus import Metrics
from .recent import Recent

Arrival = tuple[int, RequestOutput]
# Writes an output of a choice at once, or says that it can't now.
WriteThrough = Callable[[int, RequestOutput], bool]
# Outputs that wait here for a slow client; more wait merged, in their streams.
MAX_QUEUED = 64


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class Generation:
    """Runs one engine request for each choice and gathers their outputs in the order they come.

    One list takes the outputs, failures, the client's disconnect and the server's shutdown, so
    that whoever reads it waits in one place. Outputs that come while it waits go through
    ``write_through`` if there is one, past list and task. Leaving the block aborts what isn't
    finished.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[EngineRequest],
        *,
        admission: Admission,
        metrics: Metrics,
        recent: Recent,
        receive: Receive,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._admission = admission
        self._metrics = metrics
        self._recent = recent
        self._receive = receive
        self._queued: list[Arrival | Exception] = []
        self._arrived = asyncio.Event()  # set when something is queued
        self._taken = asyncio.Event()  # set when the queue has been emptied
        self._error: Exception | None = None
        self.write_through: WriteThrough | None = None
        self._waits = False  # the reader has all that came
        self._active_at = 0.0  # when the last output was written through
        self._tasks: list[asyncio.Task[None]] = []
        self._last_token_at: dict[int, float] = {}  # by choice, on the event loop's clock
        self.num_unfinished = len(requests)
        self.finals: list[RequestOutput] = []  # of choices that have ended

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def client_left(self) -> bool:
        """Whether it ended because nobody reads it any more."""
        return isinstance(self._error, ClientGone)

    @property
    def num_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self._requests)

    def end(self, error: Exception) -> None:
        """End the generation: its reader gets ``error`` after the outputs that came before."""
        self._put(error)

    async def __aenter__(self) -> Self:
        stats = await self._engine.stats()
        self._admission.enter(self, stats.retry_after)
        pumps = [self._pump(index, request) for index, request in enumerate(self._requests)]
        self._tasks = [asyncio.create_task(work) for work in (*pumps, self._watch_client())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for task in self._tasks:
                task.cancel()
            # The pumps close their iterators, which is what aborts a request in the engine.
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._admission.leave(self)
            self._let_go()

    def _let_go(self) -> None:
        """Drop what leads back here, or all of a request would wait for a full collection."""
        self._tasks.clear()
        self.write_through = None
        del self._receive

    async def arrivals(self, timeout: float | None = None) -> list[Arrival]:
        """All outputs that have come; waits for the first, and gives [] after ``timeout`` seconds
        in which none was written through either.

        Raises what ended the generation: ``StepFailed``, ``RequestTimeout``, ``EngineDead``,
        ``Overloaded``, ``ClientGone``.
        """
        if self._error is not None:
            raise self._error
        if not self._queued:
            await self._wait(timeout)
        taken, self._queued = self._queued, []
        self._taken.set()
        return self._accept(taken)

    async def _wait(self, timeout: float | None) -> None:
        self._waits = True
        try:
            await (self._arrived_soon() if timeout is None else self._arrived_within(timeout))
        finally:
            self._waits = False

    async def _arrived_soon(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    async def _arrived_within(self, timeout: float) -> None:
        """Wait until something is queued, or there was silence for ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        self._active_at = loop.time()
        while not self._queued and (left := self._active_at + timeout - loop.time()) > 0:
            # A bare timer: asyncio.timeout costs nine of them.
            timer = loop.call_later(left, self._arrived.set)
            try:
                await self._arrived_soon()
            finally:
                timer.cancel()

    def _offer(self, index: int, output: RequestOutput) -> bool:
        """Write an output past the queue, where its reader waits; true where that was done."""
        write = self.write_through
        if write is None or not self._waits or output.finish_reason is not None:
            return False
        try:
            written = write(index, output)
        except Exception as error:
            self._put(error)
            return True
        if written:
            self._active_at = asyncio.get_running_loop().time()
            self._observe(index, output)
        return written

    def _put(self, item: Arrival | Exception) -> None:
        self._waits = False
        self._queued.append(item)
        self._arrived.set()

    def _accept(self, taken: Sequence[Arrival | Exception]) -> list[Arrival]:
        accepted: list[Arrival] = []
        for item in taken:
            if isinstance(item, Exception):
                self._error = item
                break
            accepted.append(item)
            self._observe(*item)
        if self._error is not None and not accepted:
            raise self._error
        return accepted

    def _observe(self, index: int, output: RequestOutput) -> None:
        if output.token_ids:
            now = asyncio.get_running_loop().time()
            before = self._last_token_at.get(index)
            self._last_token_at[index] = now
            if before is not None:
                self._metrics.observe_gap(now - before, len(output.token_ids))
        if output.finish_reason is not None:
            self.num_unfinished -= 1
            self.finals.append(output)
            self._metrics.observe_final(output)
            self._recent.observe(self._requests[index], output)

    async def _pump(self, index: int, request: EngineRequest) -> None:
        try:
            submitted = self._engine.submit(request, partial(self._offer, index))
            async with contextlib.aclosing(submitted) as outputs:
                async for output in outputs:
                    self._put(_failure(output) or (index, output))
                    while len(self._queued) >= MAX_QUEUED:
                        self._taken.clear()
                        await self._taken.wait()
        except Exception as error:
            self._put(error)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._put(ClientGone())


def _failure(output: RequestOutput) -> NSAServeError | None:
    """An output that ends its request without an answer, as an error."""
    if output.error is not None and output.error_param is not None:
        return InvalidParameter(output.error, param=output.error_param)
    if output.finish_reason is FinishReason.TIMEOUT:
        return RequestTimeout(output.error or "the request was ended at its time-out")
    if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        return StepFailed(output.error or f"request {output.request_id} was aborted")
    return None
