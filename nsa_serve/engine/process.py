"""The engine in a process of its own: ``python -m nsa_serve.engine.process FOLDER``.

FOLDER is a private one with two ipc sockets that the server has bound. The configuration comes
first on standard input; when that closes, the server is gone, however it went, and so the engine
goes too.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence

import msgspec
import zmq

from ..config import EngineConfig
from ..errors import NSAServeError
from .engine import Engine
from .loop import EngineLoop
from .messages import (
    COMMANDS,
    EVENTS,
    Command,
    Event,
    Fatal,
    LoadProgress,
    Ready,
    Report,
    Unreadable,
    command_decoder,
    config_decoder,
    encoder,
    endpoint,
    read_frame,
)

logger = logging.getLogger(__name__)

MAX_FATAL_CHARS = 500
FLUSH_MS = 1000  # for the last events to reach the server


class SocketPort:
    """The engine's ends of the two sockets. Used by the loop's thread only."""

    def __init__(self, folder: str) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        # The server bounds its open requests, and each sends two commands at most.
        self._commands.set_hwm(0)
        self._commands.connect(endpoint(folder, COMMANDS))
        self._events.connect(endpoint(folder, EVENTS))

    def receive(self, timeout: float | None) -> Sequence[Command | Unreadable]:
        if timeout != 0.0:
            self._commands.poll(None if timeout is None else int(timeout * 1000))
        commands: list[Command | Unreadable] = []
        while True:
            try:
                request_id, payload = self._commands.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return commands
            commands.append(_read(request_id, payload))

    def send(self, report: Report) -> None:
        self.announce(report)

    def announce(self, event: Event) -> None:
        self._events.send(encoder.encode(event))

    def close(self) -> None:
        self._commands.close(0)
        self._events.close(FLUSH_MS)
        self._context.term()


def _read(request_id: bytes, payload: bytes) -> Command | Unreadable:
    try:
        return command_decoder.decode(payload)
    # Text that is no UTF-8 has an error of its own.
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Unreadable(request_id.decode("utf-8", "replace"), str(error))


def main() -> int:
    """Run until told to stop: 0. A failure is sent to the server in one line first: 1."""
    # The server decides when the engine ends: it may want to drain first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A crash in native code, and a server that finds the engine frozen, leave stacks in the log.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # The server has checked the level.
    level = os.environ.get("NSA_SERVE_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    folder = sys.argv[1]
    config = config_decoder.decode(read_frame(sys.stdin.buffer))
    threading.Thread(target=_leave_with_server, args=(folder,), daemon=True).start()
    port = SocketPort(folder)
    try:
        _serve(config, port)
    except BaseException as error:
        _announce_failure(port, error)
        return 1
    finally:
        port.close()
    return 0


def _serve(config: EngineConfig, port: SocketPort) -> None:
    def on_progress(done: int, total: int) -> None:
        port.announce(LoadProgress(done, total))

    engine = Engine.from_config(config, on_progress)
    assert engine.description is not None
    # A full collection would walk all that was imported, and no request moves meanwhile.
    gc.collect()
    gc.freeze()
    port.announce(Ready(engine.description))
    EngineLoop(engine, port).run()
    # This process ends without the interpreter's own end, which would see to it.
    engine.close()


def _announce_failure(port: SocketPort, error: BaseException) -> None:
    expected = isinstance(error, NSAServeError)
    if not expected:
        logger.error("the engine failed", exc_info=error)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())[:MAX_FATAL_CHARS]
    port.announce(Fatal(type(error).__name__ if expected else "EngineDead", line))


def _leave_with_server(folder: str) -> None:
    """Wait for the end of standard input, then end this process, even in the midst of a step."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Finalising torch takes a second, and may hang where the device is lost.
    os._exit(code)
