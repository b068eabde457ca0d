"""What a person sees of a load test: a line while it runs, a table after it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..report import show_table
from .http import Clock
from .runner import LoadRunner

_REFRESH_SECONDS = 0.25
_MAX_ERRORS = 10
# From here on, the client rather than the server may be what was measured.
_LATE_MS = 20.0
_BUSY_SHARE = 0.8

console = Console(stderr=True, highlight=False)
_TITLES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2EL",
}
_ROWS = (
    ("successful requests", "completed"),
    ("failed requests", "failed"),
    ("duration, s", "duration"),
    ("input tokens", "total_input_tokens"),
    ("of them cached", "total_cached_tokens"),
    ("generated tokens", "total_output_tokens"),
    ("requests/s", "request_throughput"),
    ("goodput, requests/s", "request_goodput"),
    ("output tokens/s", "output_throughput"),
    ("peak output tokens/s", "max_output_tokens_per_s"),
    ("all tokens/s", "total_token_throughput"),
    ("peak concurrent requests", "max_concurrent_requests"),
)


async def watch(runner: LoadRunner, total: int, clock: Clock) -> None:
    """A line that is redrawn until it is cancelled: requests ended, running, failed, tokens/s."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    disabled = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disabled) as progress:
        task = progress.add_task("requests", total=total, state="")
        tokens, at = 0, clock()
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            now_tokens, now = runner.num_tokens, clock()
            rate = (now_tokens - tokens) / (now - at) if now > at else 0.0
            progress.update(task, completed=runner.num_ended, state=state_line(runner, rate))
            tokens, at = now_tokens, now


def state_line(runner: LoadRunner, tokens_per_s: float) -> str:
    failed = f" · {runner.num_failed} failed" if runner.num_failed else ""
    return f"{runner.num_running} running{failed} · {tokens_per_s:,.0f} tokens/s"


def show_result(title: str, result: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Two tables (counts and rates, latencies in ms), then what was wrong."""
    rows = [(name, result[key]) for name, key in _ROWS if result[key] is not None]
    show_table(title, ("", ""), [(name, _figure(value)) for name, value in rows])
    columns = [key.removesuffix("_ttft_ms") for key in _keys_of("ttft", result)] or [
        key.removesuffix(f"_{metrics[0]}_ms") for key in _keys_of(metrics[0], result)
    ]
    table = [
        (_TITLES[metric], *(f"{result[key]:.2f}" for key in _keys_of(metric, result)))
        for metric in metrics
    ]
    show_table("milliseconds", ("", *columns), table)
    for line in warnings(result):
        console.print(line, style="bold red")


def _keys_of(metric: str, result: Mapping[str, Any]) -> list[str]:
    return [key for key in result if key.endswith(f"_{metric}_ms")]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Lines about failed requests, an early end, and a client that could not keep up."""
    counts = sorted(result["error_counts"].items(), key=lambda item: -item[1])
    lines = [f"{count} × {error}" for error, count in counts[:_MAX_ERRORS]]
    if len(counts) > _MAX_ERRORS:
        lines.append(f"and {len(counts) - _MAX_ERRORS} more kinds of errors")
    if result["interrupted"]:
        lines.append(f"interrupted: {result['interrupted']} requests were cut and count nowhere")
    if result["p99_client_lag_ms"] > _LATE_MS or result.get("client_cpu_share", 0) > _BUSY_SHARE:
        lines.append(
            f"the client was busy (requests up to {result['p99_client_lag_ms']:.0f} ms late, "
            f"{result.get('client_cpu_share', 0):.0%} of a core): figures may be its own"
        )
    return lines
