"""Which requests may still come in, and how the open ones end when the server does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from ..errors import Overloaded

RETRY_QUEUE = 1  # seconds; a step or two frees places
END_GRACE = 2.0  # seconds for clients to read the error that ends their stream
RETRY_SHUTDOWN = 5  # seconds; another server, or this one again, takes over


class Endable(Protocol):
    """An open request: how much room it takes, and how to end it early."""

    @property
    def num_requests(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def end(self, error: Exception) -> None: ...


class Admission:
    """The open requests and their size. Refuses early what the engine would only queue up."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.draining = False
        self.num_rejected = 0
        self._open: set[Endable] = set()
        self._num_requests = 0
        self._num_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raise ``Overloaded`` while the server drains, before any work is done on a request."""
        if self.draining:
            self.num_rejected += 1
            raise _shutting_down()

    def enter(self, entry: Endable, retry_after: int = 1) -> None:
        """Count the request in, or raise ``Overloaded`` with the seconds the engine expects.

        Alone, a request of any size is let in.
        """
        self.check()
        requests = self._num_requests + entry.num_requests
        tokens = self._num_tokens + entry.num_tokens
        if self._open and (requests > self.max_requests or tokens > self.max_tokens):
            self.num_rejected += 1
            raise Overloaded(
                f"the queue is full: {self._num_requests} requests with {self._num_tokens} "
                f"prompt tokens; at most {self.max_requests} and {self.max_tokens}",
                retry_after=retry_after,
            )
        self._count(entry, 1)
        self._open.add(entry)
        self._idle.clear()

    def leave(self, entry: Endable) -> None:
        self._open.remove(entry)
        self._count(entry, -1)
        if not self._open:
            self._idle.set()

    def _count(self, entry: Endable, sign: int) -> None:
        self._num_requests += sign * entry.num_requests
        self._num_tokens += sign * entry.num_tokens

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def drain(self, timeout: float) -> None:
        """Let nothing in; wait at most ``timeout`` seconds for what is open, then end it."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            await self.end_all(_shutting_down())

    async def end_all(self, error: Exception) -> None:
        """End every open request with ``error`` and give its client a moment to read it."""
        self.cut(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_GRACE):
                await self._idle.wait()

    def cut(self, error: Exception | None = None) -> None:
        """End every open request with ``error`` (by default: shutting down), and wait for none."""
        for entry in self._open:
            entry.end(error or _shutting_down())


def _shutting_down() -> Overloaded:
    return Overloaded("the server is shutting down", retry_after=RETRY_SHUTDOWN)
