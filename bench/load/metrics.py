"""vLLM's definitions and names of what a load test measures, so that results compare line by line.

TTFT: from sending to the first chunk that carries a token. ITL: between neighbouring such chunks.
E2EL: from sending to the last chunk. TPOT: (E2EL − TTFT) / (tokens − 1). Goodput: requests a second
that met every stated limit. Failed requests count in none of them, and are told by number.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from .outcome import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")
_LIMITED = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Measured:
    """One load: its outcomes and how long it ran, in seconds of one clock."""

    outcomes: tuple[Outcome, ...]
    start: float
    duration: float
    interrupted: bool = False

    @property
    def completed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.success]

    @property
    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if not o.success and not o.interrupted]

    def samples(self, metric: str) -> list[float]:
        """Every value of ``ttft``, ``tpot``, ``itl`` or ``e2el``, in seconds."""
        done = self.completed
        if metric == "itl":
            return [gap for outcome in done for gap in outcome.itls]
        if metric == "tpot":
            return [outcome.tpot for outcome in done if outcome.output_len > 1]
        return [o.ttft if metric == "ttft" else o.latency for o in done]

    def errors(self) -> Counter[str]:
        """How often each error came."""
        return Counter(outcome.error or "no token" for outcome in self.failed)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds by metric, from words such as ``ttft:200``.

    Several may stand in one word, apart by spaces or commas. Raises ``ConfigError``.
    """
    limits: dict[str, float] = {}
    for pair in " ".join(pairs).replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in _LIMITED or not limit >= 0:
            raise ConfigError(
                f"--goodput {pair} is no limit such as ttft:200 (milliseconds); names are "
                f"{', '.join(_LIMITED)}"
            )
        limits[name] = limit
    return limits


def meets(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """Whether a request met every limit, in milliseconds; one that failed never does."""
    if not outcome.success:
        return False
    seen = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return all(1e3 * seen[name] <= limit for name, limit in limits.items())


def summary(
    measured: Measured,
    *,
    metrics: Sequence[str] = METRICS,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures under vLLM's keys, and a few of ours behind them."""
    done, seconds = measured.completed, measured.duration
    num_in = sum(outcome.input_len for outcome in done)
    num_out = sum(outcome.output_len for outcome in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(measured.failed),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(done) / seconds,
        "request_goodput": (
            sum(meets(outcome, goodput) for outcome in done) / seconds if goodput else None
        ),
        "output_throughput": num_out / seconds,
        "total_token_throughput": (num_in + num_out) / seconds,
        "max_output_tokens_per_s": peak_token_rate(done),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for metric in metrics:
        found |= _distribution(metric, measured.samples(metric), percentiles)
    return {**found, **_beside(measured)}


def _distribution(
    metric: str, seconds: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float]:
    values = [1e3 * value for value in seconds] or [0.0]
    found = {
        f"mean_{metric}_ms": statistics.fmean(values),
        f"median_{metric}_ms": statistics.median(values),
        f"std_{metric}_ms": statistics.pstdev(values),
    }
    for percent in percentiles:
        found[f"p{percent:g}_{metric}_ms"] = percentile(values, percent)
    return found


def _beside(measured: Measured) -> dict[str, Any]:
    """What vLLM doesn't tell: cached tokens, errors by kind, and how late the client was."""
    lags = [outcome.sent - outcome.due for outcome in measured.outcomes]
    return {
        "total_cached_tokens": sum(o.cached_tokens or 0 for o in measured.completed),
        "interrupted": sum(outcome.interrupted for outcome in measured.outcomes),
        "error_counts": dict(measured.errors()),
        "p99_client_lag_ms": 1e3 * percentile(lags, 99),
    }


def details(measured: Measured) -> dict[str, list[Any]]:
    """Request by request, as vLLM's ``--save-detailed`` writes it. Failed ones have zeros."""
    outcomes = measured.outcomes
    return {
        "input_lens": [outcome.input_len for outcome in outcomes],
        "output_lens": [o.output_len if o.success else 0 for o in outcomes],
        "ttfts": [o.ttft if o.token_times else 0.0 for o in outcomes],
        "itls": [outcome.itls for outcome in outcomes],
        "latencies": [o.latency if o.token_times else 0.0 for o in outcomes],
        "start_times": [outcome.sent - measured.start for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def peak_token_rate(outcomes: Sequence[Outcome]) -> float:
    """The most chunks with tokens in any second, seconds counted from the first send."""
    if not outcomes:
        return 0.0
    start = min(outcome.sent for outcome in outcomes)
    seconds = Counter(int(at - start) for outcome in outcomes for at in outcome.token_times)
    return float(max(seconds.values()))


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """The most requests under way at one instant."""
    events = [(o.sent, 1) for o in outcomes] + [(o.sent + o.latency, -1) for o in outcomes]
    running = peak = 0
    for _, change in sorted(events):
        running += change
        peak = max(peak, running)
    return peak
