"""The engine process as the server sees it: started, spoken to and watched from one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Self

import zmq
import zmq.asyncio

from ..config import EngineConfig
from ..engine.messages import (
    COMMANDS,
    EVENTS,
    Abort,
    Command,
    EngineDescription,
    Event,
    Fatal,
    LoadProgress,
    Ping,
    Ready,
    Report,
    Shutdown,
    Submit,
    Survey,
    encoder,
    endpoint,
    event_decoder,
    frame,
)
from ..errors import ConfigError, EngineDead, InvalidParameter, NSAServeError, Overloaded
from ..request import EngineRequest, RequestOutput
from ..stats import CacheMap, StatsSnapshot
from .output_stream import OutputStream, Sink, named_error, rebuild

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]  # (bytes of weights read, bytes in all)

# Idle threads of libgomp spin for milliseconds by default; on few cores that is the server's time.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
EXIT_SECONDS = 5.0  # for an engine that was told to stop, and then it is killed
CONNECT_MS = 10_000
LAST_WORDS_MS = 100  # for events that were under way when the process ended


class EngineClient:
    """Requests to the engine process. ``start`` makes one; ``aclose`` ends it.

    When the process dies, every open stream raises ``EngineDead``, and so does whatever is asked
    for afterwards.
    """

    engine: EngineDescription

    def __init__(self, process: Process, folder: str, max_open: int) -> None:
        self._process = process
        self._folder = folder
        self._max_open = max_open
        self._streams: dict[str, OutputStream] = {}
        self._stats: StatsSnapshot | None = None
        self._cache_map: CacheMap | None = None
        self._surveyed = asyncio.Event()  # set and replaced at each map
        self._dead: NSAServeError | None = None
        self._closing = False
        self._failure: NSAServeError | None = None  # what ended the start
        self._started = asyncio.Event()  # ready or failed
        self._heard = asyncio.Event()  # set and replaced at each report
        self._idle = asyncio.Event()
        self._released = False
        self._on_progress: OnProgress | None = None
        self._context, self._commands, self._events = _bind(folder)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: EngineConfig, on_progress: OnProgress | None = None) -> Self:
        """Start the engine and wait until it is ready.

        Raises ``ConfigError`` or ``CheckpointError`` with the engine's own words where it can't
        start, and ``EngineDead`` where it broke.
        """
        folder = _private_folder()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nsa_serve.engine.process", folder),
                stdin=PIPE,
                env={**ENGINE_ENVIRONMENT, **os.environ},
                # Ctrl-C at the terminal is the server's to handle; the engine ends when it says so.
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(folder)
            raise
        schedule = config.schedule
        client = cls(process, folder, 4 * (schedule.max_num_queued_reqs + schedule.max_num_seqs))
        client._on_progress = on_progress
        try:
            await client._await_ready(config)
        except BaseException:
            await client.aclose()
            raise
        return client

    async def submit(
        self, request: EngineRequest, sink: Sink | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request until its final one. Closing the iterator early aborts it.

        A ``sink`` is offered each output before, if none waits here: it costs no switch of tasks.
        Raises the ``RequestError`` that the engine's door raised, ``Overloaded`` where the queue
        is full, or ``EngineDead``.
        """
        stream = self._open(request, sink)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._abandon(request.request_id, stream)

    async def ping(self, timeout: float) -> None:
        """Return once the engine's loop has turned. Raises ``TimeoutError`` or ``EngineDead``."""
        self._send(Ping())
        async with asyncio.timeout(timeout):
            await self._heard.wait()
        if self._dead is not None:
            raise self._dead

    def cpu_seconds(self) -> float | None:
        """Processor time of the process, if it computes on the CPU and the system (Linux) tells.

        Whoever waits for a GPU spins, whether the GPU gets on or not.
        """
        if self.engine.device != "cpu":
            return None
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def dump_stacks(self) -> None:
        """Have the engine write the stacks of all its threads to the log.

        It does so in the midst of a step too; one that is stopped does when it goes on.
        """
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    async def stats(self) -> StatsSnapshot:
        """The engine's counters as of its last turn; they can be had while a step is long."""
        if self._dead is not None:
            raise self._dead
        assert self._stats is not None, "the engine has not reported yet"
        return self._stats

    async def cache_map(self, patience: float) -> CacheMap | None:
        """A map of the cache: a new one, or after ``patience`` seconds the last that came."""
        self._send(Survey())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._surveyed.wait()
        return self._cache_map

    async def died(self) -> None:
        """Wait for the process to end, however it does."""
        await asyncio.shield(self._watch)

    async def aclose(self, drain: float = 0.0) -> None:
        """Let nothing in, let what is open end for ``drain`` seconds, abort the rest and stop."""
        self._closing = True
        if self._dead is None and self._started.is_set():
            await self._drain(drain)
            with contextlib.suppress(EngineDead):
                self._send(Shutdown())
        try:
            await self._await_exit()
        finally:
            await self._release()

    @property
    def _watch(self) -> asyncio.Task[None]:
        return self._tasks[1]

    async def _await_ready(self, config: EngineConfig) -> None:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._await_death())]
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(frame(encoder.encode(config)))
        await self._started.wait()
        if self._failure is not None:
            raise self._failure
        self._commands.poll(CONNECT_MS, zmq.POLLOUT)
        await self.ping(CONNECT_MS / 1000)

    async def _drain(self, timeout: float) -> None:
        """Wait for the open requests, then abort those that are left, and wait for their ends."""
        for patience in (timeout, EXIT_SECONDS):
            if not self._streams:
                return
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._idle.wait()
            for request_id, stream in self._streams.items():
                if not stream.abandoned:
                    with contextlib.suppress(EngineDead):
                        self._send(Abort(request_id), request_id)

    async def _await_exit(self) -> None:
        """Wait for an engine that ends by itself; one that still loads reads no commands."""
        patience = EXIT_SECONDS if self._started.is_set() else 0.0
        try:
            async with asyncio.timeout(patience):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _release(self) -> None:
        if self._released:
            return
        self._released = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._die(EngineDead("the server is shutting down"))
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._commands.close(0)
        self._events.close(0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, request: EngineRequest, sink: Sink | None) -> OutputStream:
        if self._closing:
            raise Overloaded("the server is shutting down", retry_after=1)
        if request.request_id in self._streams:
            raise InvalidParameter(
                f"a request with id {request.request_id!r:.80} is running already",
                param="request_id",
            )
        if len(self._streams) >= self._max_open:
            raise Overloaded(f"{len(self._streams)} requests are open already", retry_after=1)
        self._send(Submit(request, time.monotonic()), request.request_id)
        stream = self._streams[request.request_id] = OutputStream(sink)
        return stream

    def _abandon(self, request_id: str, stream: OutputStream) -> None:
        if self._streams.get(request_id) is not stream:
            return  # it has ended
        stream.abandoned = True
        # A dead engine has nothing to abort.
        with contextlib.suppress(EngineDead):
            self._send(Abort(request_id), request_id)

    def _send(self, command: Command, request_id: str = "") -> None:
        """Queue a command; never waits."""
        if self._dead is not None:
            raise self._dead
        try:
            payload = encoder.encode(command)
            topic = request_id.encode()
        except (OverflowError, UnicodeEncodeError, TypeError) as error:
            raise InvalidParameter(f"the request can't be sent: {error}") from None
        try:
            self._commands.send_multipart([topic, payload], zmq.NOBLOCK)
        except zmq.Again:
            raise EngineDead("the engine process is gone") from None

    async def _read(self) -> None:
        try:
            while True:
                self._take(event_decoder.decode(await self._events.recv()))
        except Exception as error:
            logger.exception("reading from the engine failed")
            self._die(EngineDead(f"reading from the engine failed: {error}"))
            self._process.kill()

    async def _await_death(self) -> None:
        """Watch the process; what it said last is still read."""
        code = await self._process.wait()
        reader = self._tasks[0]
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        while await self._events.poll(LAST_WORDS_MS):
            self._take(event_decoder.decode(await self._events.recv()))
        self._die(EngineDead(f"the engine process ended (exit status {code}); see its log"))

    def _take(self, event: Event) -> None:
        match event:
            case Report():
                self._take_report(event)
            case LoadProgress(done, total):
                if self._on_progress is not None:
                    self._on_progress(done, total)
            case Ready(description):
                self.engine = description
                self._started.set()
            case Fatal(kind, message):
                self._die(named_error(kind, message, fallback=EngineDead))

    def _take_report(self, report: Report) -> None:
        self._stats = report.stats
        heard, self._heard = self._heard, asyncio.Event()
        heard.set()
        if report.cache is not None:
            self._cache_map = report.cache
            surveyed, self._surveyed = self._surveyed, asyncio.Event()
            surveyed.set()
        for rejection in report.rejections:
            stream = self._end_stream(rejection.request_id)
            if stream is not None:
                stream.fail(rebuild(rejection))
        for output in report.outputs:
            self._take_output(output)

    def _take_output(self, output: RequestOutput) -> None:
        if output.finish_reason is None:
            stream = self._streams.get(output.request_id)
        else:
            stream = self._end_stream(output.request_id)
        if stream is not None:
            stream.push(output)

    def _end_stream(self, request_id: str) -> OutputStream | None:
        stream = self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()
        return stream

    def _die(self, error: NSAServeError) -> None:
        """The first reason stays."""
        if self._dead is not None:
            return
        self._dead = error if isinstance(error, EngineDead) else EngineDead(str(error))
        if not self._started.is_set():
            self._failure = error
        self._started.set()
        self._heard.set()
        for request_id in list(self._streams):
            stream = self._end_stream(request_id)
            if stream is not None:
                stream.fail(self._dead)


def _private_folder() -> str:
    """A new folder for the sockets that only this user can enter."""
    folder = tempfile.mkdtemp(prefix="nsa-serve-")
    if len(f"{folder}/{COMMANDS}") >= zmq.IPC_PATH_MAX_LEN:
        shutil.rmtree(folder)
        raise ConfigError(
            f"the path {folder} is too long for a socket (at most {zmq.IPC_PATH_MAX_LEN} bytes): "
            "set TMPDIR to a shorter one"
        )
    return folder


def _bind(folder: str) -> tuple[zmq.asyncio.Context, zmq.Socket[bytes], zmq.asyncio.Socket]:
    """(context, socket for commands, socket for events) at the folder's endpoints."""
    context = zmq.asyncio.Context()
    # Commands are sent without waiting, so their socket is a plain one.
    commands: zmq.Socket[bytes] = zmq.Context.shadow(context).socket(zmq.PUSH)
    # Bounded by the number of open requests, each of which sends two commands at most.
    commands.set_hwm(0)
    commands.bind(endpoint(folder, COMMANDS))
    events = context.socket(zmq.PULL)
    events.bind(endpoint(folder, EVENTS))
    return context, commands, events
