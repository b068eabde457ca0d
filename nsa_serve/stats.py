"""Counters of the engine: written by the scheduler, sent to the server as a snapshot."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from .request import FinishReason

ITERATION_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class TierReport(msgspec.Struct, frozen=True):
    """What the host tier has done since the engine started."""

    lookups: int = 0  # selected pieces that lay in host memory
    hits: int = 0  # of them found among the hot blocks
    fetched_bytes: int = 0  # of the others, brought into hot slots; the rest is read in place
    prefetched: int = 0  # pieces brought in before a step looked them up
    prefetched_bytes: int = 0
    prefetch_hits: int = 0  # of those pieces, looked up while they were there
    out_bytes: int = 0  # of whole pages
    out_transfers: int = 0
    out_seconds: float = 0.0
    in_bytes: int = 0
    in_transfers: int = 0
    in_seconds: float = 0.0
    stall_seconds: float = 0.0  # computation waited for copies of whole pages


class StreamReport(msgspec.Struct, frozen=True):
    """What copying weights to the device has taken since the engine started."""

    num_bytes: int = 0
    seconds: float = 0.0  # that the copies took
    stall_seconds: float = 0.0  # that computation waited for them

    @property
    def overlap(self) -> float:
        """Share of the copies' time in which something was computed, 0 to 1."""
        return 1 - min(1.0, self.stall_seconds / self.seconds) if self.seconds else 1.0


class DiskReport(msgspec.Struct, frozen=True):
    """What the disk tier has done since the engine started."""

    num_bytes: int = 0  # gauge: of its files
    written_bytes: int = 0  # of pages
    read_bytes: int = 0
    bad_pages: int = 0  # short or damaged, and computed anew
    dropped_pages: int = 0  # not written: the disk was too slow, or refused


class StatsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All counters at one moment. Counts only grow over an engine's life; gauges say so."""

    num_running: int  # gauge
    num_waiting: int  # gauge
    num_queued_tokens: int = 0  # gauge: prompt tokens of those that wait
    num_prefill_tokens: int = 0  # gauge: prompt tokens that those who run still lack
    oldest_prefill: float = 0.0  # gauge: share that is computed of the oldest such prompt, 0 to 1
    prefill_tokens_per_s: float = 0.0  # gauge: as measured of late; 0 before that
    retry_after: int = 1  # gauge: seconds after which who is refused now should come again
    num_blocks: int  # gauge
    num_blocks_in_use: int  # gauge
    num_blocks_cached: int  # gauge: held by nobody, kept for their content
    num_steps: int
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # of them found
    num_preemptions: int
    num_lost_tokens: int = 0  # computed, lost to preemptions and not in the prefix cache for sure
    prompt_tokens: int  # of requests that reached their first token
    cached_tokens: int  # of them taken from the prefix cache
    generation_tokens: int
    num_rejected: int  # refused at the door
    num_late: int = 0  # ended after their deadline
    num_void_logits: int  # requests that failed because their logits had no finite maximum
    num_finished: dict[str, int]  # by finish reason
    iteration_buckets: list[int]  # steps by tokens computed: bounds of ITERATION_BUCKETS, then more
    iteration_tokens: int  # tokens computed in all steps
    tier: TierReport | None = None  # None: there is no host tier
    num_blocks_spilled: int = 0  # gauge: of those that hold something, in host memory alone
    stream: StreamReport | None = None  # None: all weights are on the device
    disk: DiskReport | None = None  # None: there is no disk tier

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return self.num_blocks_in_use / self.num_blocks


class CacheMap(msgspec.Struct, frozen=True):
    """Every block's state at one moment, for a person to look at."""

    holders: bytes  # of each block: requests that hold it, at most 254; 255: kept for its content
    spilled: list[int]  # blocks whose raw pages are in host memory alone


@dataclass(slots=True)
class EngineStats:
    """The running counters; fields as in ``StatsSnapshot``."""

    num_steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preemptions: int = 0
    num_lost_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_rejected: int = 0
    num_late: int = 0
    num_void_logits: int = 0
    num_finished: Counter[FinishReason] = field(default_factory=Counter)
    iteration_buckets: list[int] = field(default_factory=lambda: [0] * (len(ITERATION_BUCKETS) + 1))
    iteration_tokens: int = 0
    tier: TierReport | None = None
    stream: StreamReport | None = None
    disk: DiskReport | None = None

    def count_step(self, num_tokens: int) -> None:
        self.num_steps += 1
        self.iteration_tokens += num_tokens
        self.iteration_buckets[bisect_left(ITERATION_BUCKETS, num_tokens)] += 1

    def count_lookup(self, num_tokens: int, num_hits: int) -> None:
        """A prompt was looked up in the prefix cache."""
        self.prefix_queries += num_tokens
        self.prefix_hits += num_hits

    def count_prompt(self, num_tokens: int, num_cached: int) -> None:
        """A request has its first token: its prompt is done."""
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def snapshot(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_queued_tokens: int = 0,
        num_prefill_tokens: int = 0,
        oldest_prefill: float = 0.0,
        prefill_tokens_per_s: float = 0.0,
        retry_after: int = 1,
        num_blocks: int,
        num_blocks_in_use: int,
        num_blocks_cached: int,
        num_blocks_spilled: int = 0,
    ) -> StatsSnapshot:
        return StatsSnapshot(
            num_running=num_running,
            num_waiting=num_waiting,
            num_queued_tokens=num_queued_tokens,
            num_prefill_tokens=num_prefill_tokens,
            oldest_prefill=oldest_prefill,
            prefill_tokens_per_s=prefill_tokens_per_s,
            retry_after=retry_after,
            num_blocks=num_blocks,
            num_blocks_in_use=num_blocks_in_use,
            num_blocks_cached=num_blocks_cached,
            num_blocks_spilled=num_blocks_spilled,
            num_steps=self.num_steps,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            num_preemptions=self.num_preemptions,
            num_lost_tokens=self.num_lost_tokens,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generation_tokens=self.generation_tokens,
            num_rejected=self.num_rejected,
            num_late=self.num_late,
            num_void_logits=self.num_void_logits,
            num_finished={reason.value: self.num_finished[reason] for reason in FinishReason},
            iteration_buckets=list(self.iteration_buckets),
            iteration_tokens=self.iteration_tokens,
            tier=self.tier,
            stream=self.stream,
            disk=self.disk,
        )
