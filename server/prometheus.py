"""The metrics page: vLLM's names under our prefix (or vLLM's own), and a few that only we have.

Counters and gauges come from the engine's snapshot when the page is asked for; histograms are fed
by the final output of each request and by the gaps between tokens as the server hands them on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..request import RequestOutput, RequestTimes
from ..stats import ITERATION_BUCKETS, DiskReport, StatsSnapshot, StreamReport, TierReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# vLLM starts at 10 ms, which is more than one of our steps takes.
_BETWEEN_TOKENS = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(
    float(digit * 10**power)
    for power in range(7)
    for digit in (1, 2, 5)
    if digit * 10**power <= 2e6
)
_SUCCESSES = ("stop", "length", "tool_calls")

_NO_TIER = TierReport()
_NO_STREAM = StreamReport()
_NO_DISK = DiskReport()


def _tier(snapshot: StatsSnapshot) -> TierReport:
    return snapshot.tier or _NO_TIER


def _disk(snapshot: StatsSnapshot) -> DiskReport:
    return snapshot.disk or _NO_DISK


def _stream(snapshot: StatsSnapshot) -> StreamReport:
    return snapshot.stream or _NO_STREAM


@dataclass(frozen=True, slots=True)
class _Counted:
    """One number of the snapshot: its name, its meaning, how to read it, and whether it grows."""

    name: str
    text: str
    read: Callable[[StatsSnapshot], float]
    grows: bool = True


_NUMBERS = (
    _Counted("num_requests_running", "Requests in the batch", lambda s: s.num_running, False),
    _Counted("num_requests_waiting", "Requests in the queue", lambda s: s.num_waiting, False),
    _Counted(
        "kv_cache_usage_perc",
        "Share of blocks in use, 0 to 1",
        lambda s: s.cache_usage,
        False,
    ),
    _Counted("kv_cache_blocks", "Blocks of the cache", lambda s: s.num_blocks, False),
    _Counted(
        "kv_cache_blocks_cached",
        "Blocks kept for their content",
        lambda s: s.num_blocks_cached,
        False,
    ),
    _Counted("prefix_cache_queries", "Tokens looked up in cache", lambda s: s.prefix_queries),
    _Counted("prefix_cache_hits", "Tokens found in the prefix cache", lambda s: s.prefix_hits),
    _Counted("num_preemptions", "Requests preempted", lambda s: s.num_preemptions),
    _Counted(
        "preempted_tokens", "Computed tokens that preemptions cost", lambda s: s.num_lost_tokens
    ),
    _Counted(
        "num_queued_tokens", "Prompt tokens in the queue", lambda s: s.num_queued_tokens, False
    ),
    _Counted(
        "num_prefill_tokens",
        "Prompt tokens that requests in the batch lack",
        lambda s: s.num_prefill_tokens,
        False,
    ),
    _Counted(
        "prefill_tokens_per_second",
        "Prompt tokens computed in a second, of late",
        lambda s: s.prefill_tokens_per_s,
        False,
    ),
    _Counted("request_late", "Ended after their deadline", lambda s: s.num_late),
    _Counted(
        "request_timed_out", "Ended at their time-out", lambda s: s.num_finished.get("timeout", 0)
    ),
    _Counted("prompt_tokens", "Prompt tokens computed or cached", lambda s: s.prompt_tokens),
    _Counted("prompt_tokens_cached", "Prompt tokens from the cache", lambda s: s.cached_tokens),
    _Counted("generation_tokens", "Tokens generated", lambda s: s.generation_tokens),
    _Counted("engine_steps", "Steps the engine has run", lambda s: s.num_steps),
    _Counted("request_aborted", "Requests aborted", lambda s: s.num_finished.get("abort", 0)),
    _Counted(
        "request_void_logits", "Failed for lack of finite logits", lambda s: s.num_void_logits
    ),
    _Counted("kv_host_lookups", "Selected pages in host memory", lambda s: _tier(s).lookups),
    _Counted("kv_host_hits", "Of them found on the device", lambda s: _tier(s).hits),
    _Counted("kv_host_fetched_bytes", "Of the others, fetched", lambda s: _tier(s).fetched_bytes),
    _Counted("kv_host_prefetched", "Fetched ahead of need", lambda s: _tier(s).prefetched),
    _Counted("kv_host_prefetched_bytes", "Bytes of those", lambda s: _tier(s).prefetched_bytes),
    _Counted("kv_host_prefetch_hits", "Of those, looked up", lambda s: _tier(s).prefetch_hits),
    _Counted("kv_host_out_bytes", "Pages copied to the host", lambda s: _tier(s).out_bytes),
    _Counted("kv_host_out_transfers", "Copies they took", lambda s: _tier(s).out_transfers),
    _Counted("kv_host_out_seconds", "Time they took", lambda s: _tier(s).out_seconds),
    _Counted("kv_host_in_bytes", "Pages copied to the device", lambda s: _tier(s).in_bytes),
    _Counted("kv_host_in_transfers", "Copies they took", lambda s: _tier(s).in_transfers),
    _Counted("kv_host_in_seconds", "Time they took", lambda s: _tier(s).in_seconds),
    _Counted("kv_host_stall_seconds", "Steps waited for copies", lambda s: _tier(s).stall_seconds),
    _Counted("kv_disk_bytes", "Bytes of the disk tier", lambda s: _disk(s).num_bytes, False),
    _Counted("kv_disk_written_bytes", "Pages written to disk", lambda s: _disk(s).written_bytes),
    _Counted("kv_disk_read_bytes", "Pages read from disk", lambda s: _disk(s).read_bytes),
    _Counted("kv_disk_bad_pages", "Damaged, so computed anew", lambda s: _disk(s).bad_pages),
    _Counted("kv_disk_dropped_pages", "Not written", lambda s: _disk(s).dropped_pages),
    _Counted(
        "weights_streamed_bytes", "Weights copied to the device", lambda s: _stream(s).num_bytes
    ),
    _Counted("weights_copy_seconds", "Time the copies took", lambda s: _stream(s).seconds),
    _Counted("weights_stall_seconds", "Steps waited for them", lambda s: _stream(s).stall_seconds),
    _Counted("request_errored", "Requests that failed", lambda s: s.num_finished.get("error", 0)),
)


class _EngineCollector(Collector):
    """Hands the latest snapshot to Prometheus in its form."""

    def __init__(self, prefix: str, model: str) -> None:
        self.snapshot: StatsSnapshot | None = None
        self.num_rejected = 0  # by the server, before the engine saw them
        self._prefix = prefix
        self._model = model

    def collect(self) -> Iterable[Metric]:
        if self.snapshot is None:
            return
        for number in _NUMBERS:
            yield self._family(number, self.snapshot)
        yield self._resident(self.snapshot)
        yield self._rejected(self.snapshot)
        yield self._successes(self.snapshot)
        yield self._iterations(self.snapshot)

    def _family(self, number: _Counted, snapshot: StatsSnapshot) -> Metric:
        kind = CounterMetricFamily if number.grows else GaugeMetricFamily
        family = kind(f"{self._prefix}:{number.name}", number.text, labels=["model_name"])
        family.add_metric([self._model], number.read(snapshot))
        return family

    def _resident(self, snapshot: StatsSnapshot) -> Metric:
        """Blocks that hold something, by the memory that they are in."""
        family = GaugeMetricFamily(
            f"{self._prefix}:kv_cache_blocks_resident",
            "Blocks that hold something, by where they are",
            labels=["model_name", "residence"],
        )
        held = snapshot.num_blocks_in_use + snapshot.num_blocks_cached
        family.add_metric([self._model, "device"], held - snapshot.num_blocks_spilled)
        family.add_metric([self._model, "host"], snapshot.num_blocks_spilled)
        return family

    def _rejected(self, snapshot: StatsSnapshot) -> Metric:
        family = CounterMetricFamily(
            f"{self._prefix}:request_rejected",
            "Requests refused",
            labels=["model_name"],
        )
        family.add_metric([self._model], snapshot.num_rejected + self.num_rejected)
        return family

    def _successes(self, snapshot: StatsSnapshot) -> Metric:
        family = CounterMetricFamily(
            f"{self._prefix}:request_success",
            "Requests answered whole",
            labels=["model_name", "finished_reason"],
        )
        for reason in _SUCCESSES:
            family.add_metric([self._model, reason], snapshot.num_finished.get(reason, 0))
        return family

    def _iterations(self, snapshot: StatsSnapshot) -> Metric:
        family = HistogramMetricFamily(
            f"{self._prefix}:iteration_tokens_total", "Tokens of a step", labels=["model_name"]
        )
        buckets = _buckets(ITERATION_BUCKETS, snapshot.iteration_buckets)
        family.add_metric([self._model], buckets, sum_value=snapshot.iteration_tokens)
        return family


class _GapCollector(Collector):
    """The histogram of times between tokens, at the price of one of its library's counters."""

    def __init__(self, name: str, model: str) -> None:
        self._name = name
        self._model = model
        self._counts = [0] * (len(_BETWEEN_TOKENS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` tokens, whose gaps are ``seconds`` together."""
        self._counts[bisect_left(_BETWEEN_TOKENS, seconds / num_tokens)] += num_tokens
        self._sum += seconds

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, "Between two tokens", labels=["model_name"])
        family.add_metric([self._model], _buckets(_BETWEEN_TOKENS, self._counts), self._sum)
        yield family


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """(upper bound, count of all up to it) in Prometheus' form; the last has no bound."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, prefix: str, model: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(prefix, model)
        self._registry.register(self._engine)
        self._prefix = prefix
        self._model = model
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN
        )
        self._gaps = _GapCollector(f"{prefix}:inter_token_latency_seconds", model)
        self._registry.register(self._gaps)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean over a request", _BETWEEN_TOKENS
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _REQUEST
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step", _REQUEST
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token", _REQUEST
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last", _REQUEST
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._generated = self._histogram(
            "request_generation_tokens", "Tokens generated for a request", _TOKENS
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            f"{self._prefix}:{name}",
            text,
            ["model_name"],
            buckets=buckets,
            registry=self._registry,
        )
        return family.labels(self._model)

    def observe_gap(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` tokens came ``seconds`` after the ones before."""
        self._gaps.observe(seconds, num_tokens)

    def observe_final(self, output: RequestOutput) -> None:
        """A request has ended with an answer."""
        if output.usage is not None:
            self._prompt.observe(output.usage.prompt_tokens)
            self._generated.observe(output.usage.completion_tokens)
        if output.times is not None:
            generated = output.usage.completion_tokens if output.usage else 0
            self._observe_times(output.times, generated)

    def _observe_times(self, times: RequestTimes, generated: int) -> None:
        for histogram, seconds in self._spans(times):
            histogram.observe(seconds)
        if times.first_token is not None and times.last_token is not None and generated > 1:
            self._per_token.observe((times.last_token - times.first_token) / (generated - 1))

    def _spans(self, times: RequestTimes) -> Iterator[tuple[Histogram, float]]:
        first, token, last = times.first_scheduled, times.first_token, times.last_token
        if first is not None:
            yield self._queued, first - times.arrival
        if first is not None and token is not None:
            yield self._first_token, token - times.arrival
            yield self._prefill, token - first
        if token is not None and last is not None:
            yield self._decode, last - token
            yield self._whole, last - times.arrival

    def page(self, snapshot: StatsSnapshot, num_rejected: int) -> bytes:
        """The text that Prometheus scrapes. ``num_rejected`` counts the server's own refusals."""
        self._engine.snapshot = snapshot
        self._engine.num_rejected = num_rejected
        return generate_latest(self._registry)
