"""The engine's loop: commands in, steps, reports out. It alone touches the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import InvalidParameter, NSAServeError, Overloaded, RequestError
from ..request import EngineRequest, RequestOutput
from ..stats import CacheMap
from .engine import Engine
from .messages import (
    Abort,
    Command,
    Ping,
    Rejection,
    Report,
    Shutdown,
    Submit,
    Survey,
    Unreadable,
)

# The books are checked once after this long without a command, so that nobody waits for it.
IDLE_SECONDS = 1.0


class Port(Protocol):
    """Where commands come from and reports go to."""

    def receive(self, timeout: float | None) -> Sequence[Command | Unreadable]:
        """Commands that have come. Waits for one at most ``timeout`` seconds; None: for ever."""

    def send(self, report: Report) -> None: ...


class EngineLoop:
    """Runs until a ``Shutdown``. A turn takes all commands, makes a step, sends one report.

    Where an idle engine gets work, another report goes before the step.
    """

    def __init__(
        self, engine: Engine, port: Port, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._port = port
        self._clock = clock
        self._stopping = False
        self._checked = True  # since the last work
        self._outputs: list[RequestOutput] = []
        self._rejections: list[Rejection] = []
        self._cache_map: CacheMap | None = None

    def run(self) -> None:
        """Loop until told to stop. What it raises is the end of the engine."""
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """One turn: waits for a command where there is no work."""
        was_idle = not self._engine.has_work
        commands = self._port.receive(self._patience())
        for command in commands:
            self._handle(command)
        busy = self._engine.has_work
        if busy and was_idle:
            # The step may be long, and who asks meanwhile would be told of an idle engine.
            self._send_report()
        if busy:
            self._outputs += self._engine.step(self._clock())
            self._checked = False
        elif not commands and not self._checked:
            self._engine.check()
            self._checked = True
        if busy or commands:
            self._send_report()

    def _patience(self) -> float | None:
        if self._engine.has_work:
            return 0.0
        return None if self._checked else IDLE_SECONDS

    def _handle(self, command: Command | Unreadable) -> None:
        match command:
            case Submit(request, sent):
                self._submit(request, sent)
            case Abort(request_id):
                final = self._engine.abort(request_id, self._clock())
                if final is not None:
                    self._outputs.append(final)
                self._checked = False
            case Unreadable(request_id, message):
                self._reject(request_id, InvalidParameter(message))
            case Ping():
                pass  # any command is answered by the report of this turn
            case Survey():
                self._cache_map = self._engine.cache_map()
            case Shutdown():
                self._stopping = True

    def _submit(self, request: EngineRequest, sent: float | None) -> None:
        now = self._clock()
        try:
            self._engine.add(request, now if sent is None else min(sent, now))
        except (RequestError, Overloaded) as error:
            self._reject(request.request_id, error)

    def _reject(self, request_id: str, error: NSAServeError) -> None:
        self._rejections.append(
            Rejection(
                request_id,
                type(error).__name__,
                str(error),
                getattr(error, "param", None),
                getattr(error, "retry_after", None),
            )
        )

    def _send_report(self) -> None:
        report = Report(self._engine.stats(), self._outputs, self._rejections, self._cache_map)
        self._outputs, self._rejections, self._cache_map = [], [], None
        self._port.send(report)
