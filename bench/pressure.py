"""Behaviour under pressure: short requests beside a long prompt, a cache three times too small.

The same two loads run on a simulated H200 (the real scheduler and cache, steps that only take
time) or on a whole engine with random weights: ``python -m nsa_serve.bench.pressure_cli``.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Protocol

from ..errors import ConfigError
from .simulated import Came

FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0)


class Served(Protocol):
    """An engine that is stepped from here, on its own clock (seconds)."""

    num_tokens: int  # of the cache

    @property
    def now(self) -> float: ...

    @property
    def has_work(self) -> bool: ...

    def add(
        self, name: str, num_prompt: int, length: int, *, max_tokens: int | None = None
    ) -> None: ...

    def turn(self) -> list[Came]: ...

    @property
    def num_preemptions(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BesideLong:
    """Short requests that come one by one while long prompts prefill one after the other."""

    long_len: int
    short_len: int
    num_trials: int
    chunk_s: float  # mean time of a whole chunk, the long prompt alone
    ttft_chunks: list[float]  # of each short request, in whole chunks
    gap_chunks: list[float]  # between tokens of a request that decodes all the while
    slowdown: float  # of the long prompts: their mean time over that of one alone

    def record(self) -> dict[str, float | int]:
        return {
            "long_len": self.long_len,
            "short_len": self.short_len,
            "num_trials": self.num_trials,
            "chunk_ms": 1e3 * self.chunk_s,
            "ttft_chunks_median": statistics.median(self.ttft_chunks),
            "ttft_chunks_p99": percentile(self.ttft_chunks, 0.99),
            "ttft_chunks_max": max(self.ttft_chunks),
            "gap_chunks_p99": percentile(self.gap_chunks, 0.99) if self.gap_chunks else 0.0,
            "long_slowdown": self.slowdown,
        }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of all don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


@dataclass(slots=True)
class _Beside:
    """The state of one run: who is open, and what was measured."""

    engine: Served
    long_len: int
    short_len: int
    rng: random.Random
    mean_wait: float  # seconds from one short request's token to the next one's arrival
    arrives: float = 0.0
    num_long: int = 0
    num_short: int = 0
    long_since: float = 0.0
    short_open: bool = False
    ttfts: list[float] = field(default_factory=list)
    longs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    last_token: float | None = None

    def add_long(self) -> None:
        self.num_long += 1
        self.long_since = self.engine.now
        self.engine.add(f"long-{self.num_long}", self.long_len, 1)

    def turn(self) -> None:
        """One turn; a short request is added at the first turn after it has come, as in a loop."""
        if not self.short_open and self.arrives <= self.engine.now:
            self.num_short += 1
            self.short_open = True
            self.engine.add(f"short-{self.num_short}", self.short_len, 1)
        for came in self.engine.turn():
            self.take(came)

    def take(self, came: Came) -> None:
        if came.name.startswith("short"):
            self.ttfts.append(came.at - self.arrives)
            self.short_open = False
            self.arrives = came.at + self.rng.uniform(0, 2 * self.mean_wait)
        elif came.name.startswith("long"):
            self.longs.append(came.at - self.long_since)
            self.add_long()
        else:
            if self.last_token is not None:
                self.gaps.append(came.at - self.last_token)
            self.last_token = came.at


def beside_long(
    engine: Served,
    *,
    long_len: int,
    short_len: int,
    token_budget: int,
    num_trials: int,
    num_decoding: int = 0,
    seed: int = 0,
) -> BesideLong:
    """Time to the first token of short requests while a long prompt prefills.

    They come at random moments, half of the time the long prompt is alone when they come. With
    ``num_decoding`` other requests decode all the while; the gaps are those of one of them.
    """
    engine.add("alone", long_len, 1)
    start = engine.now
    while engine.has_work:
        engine.turn()
    alone = engine.now - start
    chunk = alone / -(-long_len // token_budget)
    run = _Beside(engine, long_len, short_len, random.Random(seed), mean_wait=chunk)
    budget = 4 * num_trials * 8  # tokens that outlast the trials
    for i in range(num_decoding):
        engine.add(f"decode-{i}", short_len, budget)
    run.add_long()
    run.arrives = engine.now + run.rng.uniform(0, 2 * chunk)
    while len(run.ttfts) < num_trials:
        run.turn()
    return BesideLong(
        long_len, short_len, num_trials, chunk,
        [ttft / chunk for ttft in run.ttfts], [gap / chunk for gap in run.gaps],
        statistics.mean(run.longs) / alone if run.longs else 1.0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of a load: mean lengths in tokens, each drawn from half to one and a half of it.

    With ``knows`` a request asks for exactly the tokens that it gives; else for four times the
    mean, and how much it gives is seen when it ends.
    """

    num_requests: int
    prompt_len: int
    output_len: int
    knows: bool
    seed: int = 0

    def lengths(self) -> Iterator[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request."""
        rng = random.Random(self.seed)
        for _ in range(self.num_requests):
            yield _around(rng, self.prompt_len), _around(rng, self.output_len)

    @property
    def max_tokens(self) -> int | None:
        return None if self.knows else 4 * self.output_len


def _around(rng: random.Random, mean: int) -> int:
    return rng.randint(max(1, mean // 2), max(1, mean + mean // 2))


@dataclass(frozen=True, slots=True)
class Pressed:
    """What a load gave while ``num_open`` requests were kept open: ``factor`` times what fits."""

    factor: float
    num_open: int
    output_tokens_per_s: float
    elapsed_s: float
    num_preemptions: int


def oversubscribed(engine: Served, work: Work, factor: float) -> Pressed:
    """Keep as many requests open as take ``factor`` times the cache, until all have ended.

    The rate is that of the middle: from a fifth of the requests ended to four fifths. Raises
    ``ConfigError`` where there are too few requests to keep so many open until then.
    """
    lengths = list(work.lengths())
    num_open = max(1, round(factor * engine.num_tokens / (work.prompt_len + work.output_len)))
    if num_open > 0.8 * len(lengths):
        raise ConfigError(
            f"{num_open} requests are {factor:g} times what the cache holds: --num-requests must "
            f"be at least {math.ceil(num_open / 0.8)}, not {len(lengths)}"
        )
    num_added = num_ended = num_tokens = 0
    marks: list[tuple[float, int]] = []
    start, preempted = engine.now, engine.num_preemptions
    while num_ended < len(lengths):
        while num_added < min(len(lengths), num_ended + num_open):
            prompt, output = lengths[num_added]
            name = f"{factor}-{num_added}"
            engine.add(name, prompt, output, max_tokens=work.max_tokens)
            num_added += 1
        for came in engine.turn():
            num_tokens += came.num_tokens
            num_ended += came.ended
            if came.ended and num_ended in (len(lengths) // 5, 4 * len(lengths) // 5):
                marks.append((came.at, num_tokens))
    (first, before), (last, after) = marks
    rate = (after - before) / (last - first)
    preempted = engine.num_preemptions - preempted
    return Pressed(factor, num_open, rate, engine.now - start, preempted)


def summary(found: list[Pressed]) -> dict[str, object]:
    """All points, and each one's share of the best."""
    peak = max(point.output_tokens_per_s for point in found)
    return {
        "points": [
            {**asdict(point), "share_of_peak": point.output_tokens_per_s / peak} for point in found
        ],
        "share_at_highest": found[-1].output_tokens_per_s / peak,
    }
