"""What the device does in decode steps, and what it waits for: a profile of a running engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .engine_run import BenchEngine
from .latency import WARMUP_STEPS

STEPS = 16
_MOST_KERNELS = 20


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel or copy on the device, in µs of the profiler's clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Decode steps in a row: how long they took, and how much of it the device worked."""

    num_requests: int
    context_len: int
    step_ms: float
    busy_ms: float  # of a step: some kernel or copy runs
    longest_gap_us: float  # in which nothing runs
    launches: float  # of a step
    by_kernel: dict[str, float]  # ms of a step, the most first

    def record(self) -> dict[str, Any]:
        return {
            "num_requests": self.num_requests,
            "context_len": self.context_len,
            "step_ms": self.step_ms,
            "busy_ms": self.busy_ms,
            "busy_share": self.busy_ms / self.step_ms,
            "longest_gap_us": self.longest_gap_us,
            "launches": self.launches,
            "by_kernel_ms": self.by_kernel,
        }


def record_steps(
    bench: BenchEngine, num_requests: int, context: int, trace: Path | None = None
) -> Timeline:
    """Profile ``STEPS`` decode steps of ``num_requests`` requests of ``context`` tokens each.

    ``trace``: where the whole profile goes, for a trace viewer (chrome://tracing, Perfetto).
    """
    bench.start_decodes(num_requests, context, WARMUP_STEPS + STEPS + 4)
    for _ in range(WARMUP_STEPS):
        bench.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        start = time.perf_counter()
        for _ in range(STEPS):
            bench.step()
        torch.cuda.synchronize()
        step_ms = 1e3 * (time.perf_counter() - start) / STEPS
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    bench.finish()
    bench.parts.scheduler.reset_prefix_cache()
    return summarise(list(_launches(found.events())), num_requests, context, step_ms)


def _launches(events: Iterable[Any]) -> Iterable[Launch]:
    for event in events:
        if event.device_type.name == "CUDA":
            yield Launch(event.name, event.time_range.start, event.time_range.end)


def summarise(
    launches: Sequence[Launch], num_requests: int, context: int, step_ms: float, steps: int = STEPS
) -> Timeline:
    """Of launches in any order, which may overlap."""
    busy, longest_gap, until = 0.0, 0.0, None
    for launch in sorted(launches, key=lambda launch: launch.start):
        if until is not None:
            longest_gap = max(longest_gap, launch.start - until)
        begin = launch.start if until is None else max(launch.start, until)
        busy += max(launch.end - begin, 0.0)
        until = launch.end if until is None else max(until, launch.end)
    by_kernel: dict[str, float] = {}
    for launch in launches:
        spent = (launch.end - launch.start) / 1e3 / steps
        by_kernel[launch.name] = by_kernel.get(launch.name, 0.0) + spent
    most = sorted(by_kernel.items(), key=lambda item: -item[1])[:_MOST_KERNELS]
    return Timeline(
        num_requests=num_requests,
        context_len=context,
        step_ms=step_ms,
        busy_ms=busy / 1e3 / steps,
        longest_gap_us=longest_gap,
        launches=len(launches) / steps,
        by_kernel=dict(most),
    )
