"""Timing, and what a figure must be told with: device, versions, warm-up, repeats and spread."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..kernels.cost import Cost


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds over ``repeats`` runs after ``warmup`` runs."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    repeats: int
    warmup: int

    @property
    def spread(self) -> float:
        """(high − low) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def record(self) -> dict[str, float | int]:
        return {**asdict(self), "spread": self.spread}


def summarise(samples: list[float], warmup: int) -> Timing:
    """``samples`` in milliseconds, in any order."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        repeats=len(ordered),
        warmup=warmup,
    )


def time_device(run: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> Timing:
    """Device time of ``run`` between events, the L2 cache flushed before each repeat."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(warmup):
        run()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = _event(), _event()
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return summarise([start.elapsed_time(stop) for start, stop in events], warmup)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``run`` as a CUDA graph; it is run once before, so that kernels are compiled."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(runs: Sequence[Callable[[], object]], *, repeats: int = 20) -> Timing:
    """Mean device time of ``runs``, replayed from a CUDA graph that holds them all in turn."""

    def all_runs() -> None:
        for run in runs:
            run()

    timing = time_device(captured(all_runs).replay, repeats=repeats)
    scale = 1 / len(runs)
    return Timing(
        timing.median * scale, timing.low * scale, timing.high * scale, repeats, timing.warmup
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Device memory that ``run`` takes at its highest beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reached in this run: a large copy and a large bf16 matrix product."""

    bytes_per_s: float
    flops_per_s: float


def measure_ceilings() -> Ceilings:
    """A 2 GiB device-to-device copy (bytes read and written) and an 8192³ bf16 product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = time_device(partial(target.copy_, source), repeats=10)
    moved = 2 * source.numel() * source.element_size()
    del source, target
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = time_device(lambda: a @ b, repeats=10)
    return Ceilings(moved / copy.median * 1e3, 2 * 8192**3 / product.median * 1e3)


def floor_ms(cost: Cost, ceilings: Ceilings) -> float:
    """No kernel runs faster: the larger of bytes / bandwidth and operations / rate, in ms."""
    return 1e3 * max(cost.bytes / ceilings.bytes_per_s, cost.flops / ceilings.flops_per_s)


def environment() -> dict[str, Any]:
    """Device and versions, to stand beside every figure."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
            "cuda": torch.version.cuda,
        }
    else:
        found["device"] = _cpu_name()
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return f"{lines[0].split(':')[1].strip()} × {len(lines)}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
