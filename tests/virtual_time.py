"""An event loop whose clock jumps to the next timer whenever nothing is left to do.

Servers in the same loop, joined to their clients by socket pairs, then answer with exact delays
that take no time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Looks at the sockets without waiting; time passes instead."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return super().select(None)  # a thread has to wake this loop
        self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(make: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run ``make(clock)`` on a virtual loop."""
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(make(loop.time))
