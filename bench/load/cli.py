"""``nsa-serve bench serve`` and ``nsa-serve bench sweep``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import typer
import uvloop

from ...server.flags import takes_flags
from ..report import console as plain
from ..report import save_json
from .console import show_result
from .flags import ServeLoadFlags, SweepFlags, arrivals
from .http import Clock, Connect
from .metrics import Measured, details
from .session import LoadTest, result_path
from .sweep import Step, show_sweep, sweep_rates

T = TypeVar("T")
INTERRUPTED = 130  # what shells report of a command ended by Ctrl-C

app = typer.Typer()


@app.command()
@takes_flags(ServeLoadFlags)
def serve(flags: ServeLoadFlags) -> None:
    """Load a running server and measure TTFT, time per token and throughput, as vLLM does."""
    _end(lambda clock, connect: measure(flags, clock, connect))


@app.command()
@takes_flags(SweepFlags)
def sweep(flags: SweepFlags) -> None:
    """Find the rate at which a server saturates, and the highest that keeps --goodput limits."""
    _end(lambda clock, connect: sweep_server(flags, clock, connect))


def run_async(make: Callable[[Clock, Connect | None], Coroutine[Any, Any, T]]) -> T:
    """Run a load test on a loop of its own. Ctrl-C cancels it, and it ends in order."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(make(time.perf_counter, None))


def _end(make: Callable[[Clock, Connect | None], Coroutine[Any, Any, int]]) -> None:
    try:
        code = run_async(make)
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = INTERRUPTED
    raise typer.Exit(code)


async def measure(flags: ServeLoadFlags, clock: Clock, connect: Connect | None) -> int:
    """One run with its report. Returns the exit code: 1 where no request was answered."""
    flags.check()
    process = flags.arrivals()
    async with LoadTest.open(flags, clock, connect) as test:
        sessions = await test.sessions(count=flags.num_prompts, seed=flags.seed)
        await test.warm_up(flags.num_warmups or 0, flags.seed + 1)
        cpu = time.process_time()
        measured, gauges = await test.run(sessions, process, show=not flags.disable_tqdm)
        result = test.record(measured, process)
        result["client_cpu_share"] = (time.process_time() - cpu) / max(measured.duration, 1e-9)
    show_result(f"{flags.url}{flags.path}, {result['model_id']}", result, flags.metrics)
    path = result_path(flags, result["model_id"], process.rate)
    _save(flags, path, result, measured)
    if flags.plot:
        # matplotlib is an optional part.
        from .plots import save_load_plots

        save_load_plots(path, measured, gauges)
    if measured.interrupted:
        return INTERRUPTED
    return 0 if measured.completed else 1


def _save(flags: ServeLoadFlags, path: Path, result: dict[str, Any], measured: Measured) -> None:
    record = {**result, **details(measured)} if flags.save_detailed else result
    if flags.append_result:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        plain.print(f"added to {path}")
    elif flags.save_result or flags.save_detailed:
        save_json(path, record)


async def sweep_server(flags: SweepFlags, clock: Clock, connect: Connect | None) -> int:
    """Runs at rates that a search asks for, then what was found."""
    flags.check()
    async with LoadTest.open(flags, clock, connect) as test:

        async def step(rate: float, number: int) -> Step:
            process = arrivals(rate, flags.burstiness)
            count = min(flags.num_prompts, max(20, round(rate * flags.step_seconds)))
            seed = flags.seed + 1000 * (number + 1)
            sessions = await test.sessions(count=count, seed=seed)
            warmups = 4 if flags.num_warmups is None else flags.num_warmups
            await test.warm_up(warmups, seed + 1)
            measured, _ = await test.run(sessions, process, show=not flags.disable_tqdm)
            return Step(rate, measured, test.record(measured, process))

        found = await sweep_rates(flags, step)
    show_sweep(found)
    path = result_path(flags, test.endpoint.model, flags.start_rate)
    save_json(path.with_name(f"sweep-{path.name}"), found.record())
    if flags.plot:
        from .plots import save_sweep_plot

        save_sweep_plot(path, [s.result for s in found.steps], found.limits)
    return INTERRUPTED if found.interrupted else 0
