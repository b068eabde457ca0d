"""``nsa-serve run-batch``: an engine for one file, which ends when every line has its answer."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...config import EngineConfig
from ...errors import BatchStopped, ConfigError
from ..app import create_app
from ..flags import BatchFlags
from ..settings import ServerSettings
from ..startup import console, server_settings, start_engine, tokenizer_of
from .lines import BadLine, BatchRequest, count_lines, read_lines
from .results import ResultFile, remaining

_LINE_EXTRA = 4096  # bytes of a line beside its body
_STOPPED = "stopped. What was answered is kept; run the same command again to go on"

Answered = Callable[[bool], None]  # whether it is an error


def run_batch(flags: BatchFlags) -> int:
    """Answer every line that has no answer yet. Returns the exit code: 0 if all have one now.

    Raises ``ConfigError`` or ``CheckpointError`` for what can't be run, and ``BatchStopped`` for
    a run that could not go on.
    """
    config = flags.engine_config().for_throughput()
    with _opened(flags.input_file) as lines:
        _refuse_same(flags)
        with (
            ResultFile(flags.output_file) as results,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(_Batch(flags, config, lines, results).run())


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"--input-file {path}: {error.strerror}") from None


def _refuse_same(flags: BatchFlags) -> None:
    output = flags.output_file
    if output.exists() and flags.input_file.samefile(output):
        raise ConfigError("--input-file and --output-file are the same file")


class _Batch:
    """One run over a file."""

    def __init__(
        self, flags: BatchFlags, config: EngineConfig, lines: BinaryIO, results: ResultFile
    ) -> None:
        self._flags = flags
        self._config = config
        self._lines = lines
        self._results = results
        self._num_answered = 0
        self._num_errors = 0

    async def run(self) -> int:
        total = await asyncio.to_thread(count_lines, self._lines)
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            with self._bar(total) as bar:
                await self._answer(lambda failed: self._count(bar, failed))
        except asyncio.CancelledError:
            raise BatchStopped(_STOPPED) from None
        return 0

    async def _answer(self, answered: Answered) -> None:
        config = self._config
        async with AsyncExitStack() as stack:
            engine = await start_engine(config)
            stack.push_async_callback(engine.aclose)
            tokenizer = await asyncio.to_thread(tokenizer_of, engine.engine)
            settings = server_settings(self._flags, config, engine.engine)
            app = create_app(engine, tokenizer, settings)
            stack.callback(app.state.services.workers.close)
            lines = batch_lines(self._lines, settings, self._results)
            # As many as a step takes, and as many again to take their places at once.
            at_once = 2 * config.schedule.max_num_seqs
            stack.callback(lambda: console.print(self._summary()))
            await answer_all(app, lines, self._results, answered, at_once=at_once)

    def _count(self, bar: Progress, failed: bool) -> None:
        self._num_answered += 1
        self._num_errors += failed
        bar.update(bar.task_ids[0], advance=1)

    def _bar(self, total: int) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, console=console, disable=not console.is_terminal)
        bar.add_task("lines", total=total, completed=self._results.num_kept)
        return bar

    def _summary(self) -> str:
        return (
            f"{self._num_answered} lines answered, {self._num_errors} of them with an error; "
            f"{self._results.num_kept} were there before: {self._results.path}"
        )


def batch_lines(
    file: BinaryIO, settings: ServerSettings, results: ResultFile
) -> Iterable[BatchRequest | BadLine]:
    """The lines of the input that have no answer yet."""
    return remaining(read_lines(file, settings.max_body_bytes + _LINE_EXTRA), results)


async def answer_all(
    app: Any,
    lines: Iterable[BatchRequest | BadLine],
    results: ResultFile,
    answered: Answered,
    *,
    at_once: int,
) -> None:
    """Put every line to the server's own routes, ``at_once`` at a time.

    Raises ``BatchStopped`` where the engine has died or the output can't be written.
    """
    slots = asyncio.Semaphore(at_once)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def answer(client: httpx.AsyncClient, request: BatchRequest) -> None:
        try:
            response = await _ask(client, request)
            request_id = response.headers.get("x-request-id") or f"req_{uuid.uuid4().hex}"
            results.add_answer(request, response.status_code, request_id, response.json())
            answered(response.status_code >= 400)
        finally:
            slots.release()

    try:
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client,
            asyncio.TaskGroup() as group,
        ):
            for line in lines:
                if isinstance(line, BadLine):
                    results.add_bad(line)
                    answered(True)
                else:
                    await slots.acquire()
                    group.create_task(answer(client, line))
    except ExceptionGroup as stopped:
        raise stopped.exceptions[0] from None
    results.flush()


async def _ask(client: httpx.AsyncClient, request: BatchRequest) -> httpx.Response:
    """The answer of a route; one that is overloaded is asked again."""
    headers = {"content-type": "application/json"}
    while True:
        response = await client.post(request.url, content=request.body, headers=headers)
        if response.status_code < 500:
            return response
        if response.status_code == 503:
            await asyncio.sleep(float(response.headers.get("retry-after", 1)))
        elif response.json()["error"]["code"] == "engine_dead":
            raise BatchStopped("the engine process ended; see its log. " + _STOPPED)
        else:
            return response
