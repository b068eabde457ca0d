"""Searches over offered load: where throughput stops growing, and what rate keeps the limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError
from ..report import show_table
from .console import console
from .flags import SweepFlags
from .metrics import Measured

# Doubling the rate must bring at least so much more throughput, or the server is saturated.
_MIN_GAIN = 1.1
_PERCENTILE = 99.0
_MAX_STEPS = 40


@dataclass(frozen=True, slots=True)
class Step:
    """One run at one rate, in requests/s."""

    rate: float
    measured: Measured
    result: dict[str, Any]

    @property
    def throughput(self) -> float:
        """Output tokens/s."""
        return float(self.result["output_throughput"])


@dataclass(slots=True)
class RateSearch:
    """Which rate to try next. First doubled, up to saturation or a broken limit, then bisected.

    A rate keeps the limits where ``keeps`` says so. ``precision`` is the share by which the best
    rate that does and the least that does not may differ in the end.
    """

    start: float
    stop: float
    precision: float
    tried: list[tuple[float, float, bool]] = field(default_factory=list)  # rate, tokens/s, keeps

    def add(self, rate: float, throughput: float, keeps: bool) -> None:
        self.tried.append((rate, throughput, keeps))

    def next_rate(self) -> float | None:
        """The next rate; None where the search is over."""
        if not self.tried:
            return min(self.start, self.stop)
        if len(self.tried) >= _MAX_STEPS:
            return None
        bad = self.worst_bad
        if bad is None:
            return None if self._is_saturated() else self._doubled()
        good = self.best_good
        if good is None:
            # Even the least rate so far is too much.
            return bad / 2 if bad > self.start / 64 else None
        return (good + bad) / 2 if bad - good > self.precision * bad else None

    @property
    def best_good(self) -> float | None:
        """The highest rate that kept the limits, below every rate that didn't."""
        bad = self.worst_bad
        kept = [rate for rate, _, keeps in self.tried if keeps and (bad is None or rate < bad)]
        return max(kept, default=None)

    @property
    def worst_bad(self) -> float | None:
        """The least rate that broke a limit."""
        return min((rate for rate, _, keeps in self.tried if not keeps), default=None)

    def _doubled(self) -> float | None:
        highest = max(rate for rate, _, _ in self.tried)
        return None if highest >= self.stop else min(2 * highest, self.stop)

    def _is_saturated(self) -> bool:
        if len(self.tried) < 2:
            return False
        (_, before, _), (_, after, _) = sorted(self.tried)[-2:]
        return after < _MIN_GAIN * before


def knee(points: Sequence[tuple[float, float]]) -> float | None:
    """The rate at which throughput bends away from growing with the load.

    Of (rate, throughput) points, scaled to 0…1 each, the one farthest above the line from first to
    last (Satopää et al. 2011, "Kneedle"); None where no point lies above it.
    """
    ordered = sorted(points)
    if len(ordered) < 3:
        return None
    (x0, _), (x1, _) = ordered[0], ordered[-1]
    low, high = min(y for _, y in ordered), max(y for _, y in ordered)
    if x1 == x0 or high == low:
        return None
    heights = [((y - low) / (high - low) - (x - x0) / (x1 - x0), x) for x, y in ordered]
    height, rate = max(heights)
    return rate if height > 0 else None


def keeps_limits(result: Mapping[str, Any], limits: Mapping[str, float]) -> bool:
    """Whether the 99th percentile of each limited metric is within it, and nothing failed."""
    if result["failed"] or not result["completed"]:
        return False
    return all(result[f"p99_{metric}_ms"] <= limit for metric, limit in limits.items())


@dataclass(frozen=True, slots=True)
class Sweep:
    """All steps and what follows from them."""

    steps: tuple[Step, ...]
    limits: dict[str, float]
    best_rate: float | None  # highest that keeps the limits
    interrupted: bool

    @property
    def knee(self) -> float | None:
        return knee([(step.rate, step.throughput) for step in self.steps])

    def record(self) -> dict[str, Any]:
        return {
            "limits_ms": self.limits,
            "highest_rate_within_limits": self.best_rate,
            "knee_rate": self.knee,
            "max_output_throughput": max((s.throughput for s in self.steps), default=0.0),
            "interrupted": self.interrupted,
            "steps": [step.result for step in self.steps],
        }


async def sweep_rates(
    flags: SweepFlags, run_step: Callable[[float, int], Awaitable[Step]]
) -> Sweep:
    """Try rates until the search is over, or the person ends it."""
    limits = flags.limits
    _check(flags)
    search = RateSearch(flags.start_rate, flags.max_rate, flags.precision)
    steps: list[Step] = []
    interrupted = False
    while (rate := search.next_rate()) is not None and not interrupted:
        step = await run_step(rate, len(steps))
        interrupted = step.measured.interrupted
        if interrupted:
            break
        kept = keeps_limits(step.result, limits)
        search.add(rate, step.throughput, kept)
        steps.append(step)
        console.print(_line(step, kept, limits))
    return Sweep(tuple(steps), limits, search.best_good, interrupted)


def _check(flags: SweepFlags) -> None:
    if not 0 < flags.start_rate <= flags.max_rate:
        raise ConfigError("--start-rate must be positive and at most --max-rate")
    if not 0 < flags.precision < 1:
        raise ConfigError(f"--precision must be between 0 and 1, not {flags.precision:g}")
    if _PERCENTILE not in flags.percentiles:
        raise ConfigError("--metric-percentiles must have 99, by which limits are judged")
    missing = {*flags.limits, "ttft", "tpot"} - set(flags.metrics)
    if missing:
        raise ConfigError(f"--percentile-metrics must have {', '.join(sorted(missing))}")


def _line(step: Step, kept: bool, limits: Mapping[str, float]) -> str:
    verdict = ("keeps the limits" if kept else "breaks a limit") if limits else ""
    return (
        f"{step.rate:g} requests/s: {step.throughput:,.0f} tokens/s, p99 TTFT "
        f"{step.result['p99_ttft_ms']:.0f} ms, p99 TPOT {step.result['p99_tpot_ms']:.1f} ms, "
        f"{step.result['failed']} failed {verdict}"
    )


def show_sweep(found: Sweep) -> None:
    """A row for each rate, and the answer below."""
    rows = [
        (f"{step.rate:g}", step.throughput, step.result["p99_ttft_ms"], step.result["p99_tpot_ms"],
         step.result["failed"])
        for step in sorted(found.steps, key=lambda step: step.rate)
    ]  # fmt: skip
    columns = ("requests/s", "output tokens/s", "p99 TTFT, ms", "p99 TPOT, ms", "failed")
    show_table("offered load", columns, rows)
    if found.limits:
        stated = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in found.limits.items())
        rate = "none that was tried" if found.best_rate is None else f"{found.best_rate:g} /s"
        console.print(f"highest rate with p99 {stated}: {rate}")
    if found.knee is not None:
        console.print(f"throughput bends at {found.knee:g} requests/s")
