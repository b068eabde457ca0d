"""A whole engine whose cache goes beyond the device: ``python -m nsa_serve.bench.tiered_engine``.

Prompts count as computed before (their pages hold no real K/V), and selections are replayed with a
set overlap from step to step. Each command prints a JSON line for each figure.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from ..config import GIB
from ..stats import TierReport
from .engine_run import BenchEngine
from .latency import decode_steps
from .measure import Timing, environment, summarise
from .replay import SelectionReplay

KEPT = (0.99, 0.95, 0.90, 0.85)
_WARMUP = 12  # steps after a change of the overlap: the hot blocks follow it
_ROOM = 512  # tokens behind a context, for warm-up and timed steps

app = typer.Typer(no_args_is_help=True, help="The host tier under a whole engine.")

Shape = Annotated[str, typer.Option(help="8b, 135m or a folder with a config.json.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Context = Annotated[int, typer.Option(help="Tokens that each stream has.")]
Streams = Annotated[int, typer.Option(help="Requests at once.")]
Cache = Annotated[int | None, typer.Option(help="Bytes of the device's cache.")]
Host = Annotated[float, typer.Option(help="GiB of host memory.")]
Steps = Annotated[int, typer.Option(help="Timed steps of each point.")]
Budget = Annotated[int | None, typer.Option(help="Tokens of a step, as for serve.")]
Link = Annotated[float, typer.Option(help="GB/s of the link, for the floor.")]


@dataclass(frozen=True, slots=True)
class Point:
    """Decode steps at one overlap, and what the tier did in them."""

    kept: float
    streams: int
    context: int
    step: Timing  # ms
    hit_rate: float  # of the look-ups of pages in host memory
    lookups: float  # a step
    missed_bytes: float  # a step, read over the link
    prefetched_bytes: float  # a step, beside those
    foreseen: float  # a step, prefetched pieces that were looked up
    stall_ms: float  # a step
    link: float  # bytes a second
    resident_ms: float | None  # the same step without a page in host memory

    def record(self) -> dict[str, Any]:
        link_ms = 1e3 * self.missed_bytes / self.link
        found: dict[str, Any] = {
            "kept": self.kept, "streams": self.streams, "context": self.context,
            "step_ms": self.step.record(), "tokens_per_s": 1e3 * self.streams / self.step.median,
            "hit_rate": self.hit_rate, "lookups": self.lookups,
            "missed_mb": self.missed_bytes / 1e6, "link_ms": link_ms, "stall_ms": self.stall_ms,
            "prefetched_mb": self.prefetched_bytes / 1e6, "foreseen": self.foreseen,
        }  # fmt: skip
        if self.resident_ms is not None:
            floor = self.streams / (self.resident_ms + link_ms) * 1e3
            found |= {"floor_tokens_per_s": floor, "of_floor": found["tokens_per_s"] / floor}
        return found


def start(shape: str, **flags: Any) -> BenchEngine:
    """An engine with random K/V on its device, described on a line."""
    bench = BenchEngine.start(shape, **flags)
    bench.fill_caches()
    _say(ready_s=bench.load_seconds, engine=bench.parts.worker.describe(), flags=flags)
    return bench


def open_streams(bench: BenchEngine, num_streams: int, context: int, max_tokens: int) -> None:
    """Requests of ``context`` cached tokens and one more, until each has given its first."""
    # One more, since at least one token is always computed.
    prompts = [bench.prompt(context + 1, seed=index) for index in range(num_streams)]
    for prompt in prompts:
        bench.pretend_cached(prompt[:context])
    for index, prompt in enumerate(prompts):
        bench.add(f"stream-{index}", prompt, max_tokens)
    bench.run_until_first_tokens()


def measure_point(
    bench: BenchEngine,
    kept: float,
    num_streams: int,
    context: int,
    *,
    steps: int,
    link: float,
    resident_ms: float | None,
) -> Point:
    """Steps of streams that are open already."""
    bench.timed_steps(_WARMUP)
    before = _tier(bench)
    samples = bench.timed_steps(steps)
    after = _tier(bench)
    layout = bench.parts.worker.layout
    piece = layout.bytes_per_slot // (layout.num_layers * layout.num_kv_heads)
    lookups = after.lookups - before.lookups
    missed = lookups - (after.hits - before.hits)
    return Point(
        kept, num_streams, context, summarise(samples, _WARMUP),
        1 - missed / lookups if lookups else 1.0, lookups / steps, missed * piece / steps,
        (after.prefetched_bytes - before.prefetched_bytes) / steps,
        (after.prefetch_hits - before.prefetch_hits) / steps,
        1e3 * (after.stall_seconds - before.stall_seconds) / steps, link, resident_ms,
    )  # fmt: skip


def _tier(bench: BenchEngine) -> TierReport:
    return bench.engine.stats().tier or TierReport()


def show_copies(bench: BenchEngine) -> None:
    """Rates and sizes of all copies of whole pages so far."""
    tier = _tier(bench)
    for way, num_bytes, count, seconds in (
        ("out", tier.out_bytes, tier.out_transfers, tier.out_seconds),
        ("in", tier.in_bytes, tier.in_transfers, tier.in_seconds),
    ):
        if count:
            _say(copies=way, gb=num_bytes / 1e9, transfers=count, mean_mb=num_bytes / count / 1e6,
                 gb_per_s=num_bytes / seconds / 1e9)  # fmt: skip


@app.command()
def idle(
    shape: Shape = "8b",
    device: Device = "auto",
    streams: Streams = 8,
    context: Context = 65536,
    cache: Cache = 24 * GIB,
    host: Host = 4.0,
    budget: Budget = None,
    turns: Annotated[int, typer.Option(help="Times that both are measured, in turn.")] = 3,
) -> None:
    """Decode steps with a tier that holds nothing, against an engine without one."""
    flags = {"device": device, "kv_cache_memory_bytes": cache, "max_num_seqs": max(16, streams),
             "max_model_len": context + _ROOM, "max_num_batched_tokens": budget}  # fmt: skip
    engines = {
        "without": start(shape, **flags),
        "with": start(shape, **flags, kv_host_memory_bytes=int(host * GIB)),
    }
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(turns):
        for name, bench in engines.items():
            timing = decode_steps(bench, streams, context, floor=1.0).timing
            found[name].append(timing.median)
            _say(tier=name, streams=streams, context=context, step_ms=timing.record())
    tier = _tier(engines["with"])
    _say(cost=min(found["with"]) / min(found["without"]) - 1, lookups=tier.lookups)


@app.command()
def rates(
    shape: Shape = "8b",
    device: Device = "auto",
    streams: Streams = 80,
    context: Context = 65536,
    cache: Cache = None,
    host: Host = 75.0,
    budget: Budget = None,
    steps: Steps = 24,
    link: Link = 51.0,
    resident: Annotated[
        float | None, typer.Option(help="ms of the same step, all on the device, for the floor.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="As for serve.")] = None,
    kv_runners_up: Annotated[
        int, typer.Option(help="As for serve. None of them is selected: what they cost.")
    ] = 0,
) -> None:
    """Decode throughput by hit rate, and the rates of the copies that brought the pages there."""
    bench = start(
        shape, device=device, kv_cache_memory_bytes=cache, kv_host_memory_bytes=int(host * GIB),
        max_num_seqs=max_num_seqs or streams, max_model_len=context + _ROOM,
        max_num_batched_tokens=budget, kv_runners_up=kv_runners_up,
    )  # fmt: skip
    replay = SelectionReplay(
        bench.parts.worker.model, max_rows=max_num_seqs or streams, num_ahead=kv_runners_up
    )
    began = time.perf_counter()
    open_streams(bench, streams, context, 8 + (len(KEPT) + 1) * (_WARMUP + steps))
    _say(opened_s=time.perf_counter() - began,
         spilled=bench.engine.stats().num_blocks_spilled)  # fmt: skip
    show_copies(bench)
    for kept in KEPT:
        replay.keep.fill_(kept)
        point = measure_point(
            bench, kept, streams, context, steps=steps, link=link * 1e9, resident_ms=resident
        )
        _say(**point.record())
    show_copies(bench)


@app.command()
def oversubscribed(
    shape: Shape = "8b",
    device: Device = "auto",
    streams: Streams = 32,
    context: Context = 65536,
    cache: Cache = 9_126_805_504,  # pages and entries of four streams of the 8b shape
    host: Host = 66.0,
    budget: Budget = None,
    tokens: Annotated[int, typer.Option(help="Output tokens of each request.")] = 128,
    few: Annotated[int, typer.Option(help="Requests measured without the tier.")] = 12,
    kept: Annotated[float, typer.Option(help="Overlap of the selections.")] = 0.95,
) -> None:
    """All streams ask at once, with a device cache of a few of them: with the tier and without."""
    flags = {"device": device, "kv_cache_memory_bytes": cache, "max_num_seqs": streams,
             "max_model_len": context + _ROOM, "max_num_batched_tokens": budget}  # fmt: skip
    found = {}
    for name, count, more in (
        ("with", streams, {"kv_host_memory_bytes": int(host * GIB)}),
        ("without", min(few, streams), {}),
    ):
        bench = start(shape, **flags, **more)
        SelectionReplay(bench.parts.worker.model, max_rows=streams).keep.fill_(kept)
        found[name] = _serve_all(bench, count, context, tokens)
        show_copies(bench)
        tier = _tier(bench)
        _say(tier=name, requests=count, tokens_per_s=found[name],
             preemptions=bench.engine.stats().num_preemptions,
             hit_rate=tier.hits / tier.lookups if tier.lookups else None)  # fmt: skip
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    _say(gain=found["with"] / found["without"])


def _serve_all(bench: BenchEngine, count: int, context: int, tokens: int) -> float:
    """Output tokens a second of conversations whose contexts were computed before, if kept."""
    prompts = [bench.prompt(context + 1, seed=index) for index in range(count)]
    for prompt in prompts:
        bench.pretend_cached(prompt[:context])
    # Captures the graphs. Without a tier the contexts would be computed for that.
    kept = bench.parts.worker.tiers is not None
    for index, prompt in enumerate(prompts):
        bench.add(f"warm-up-{index}", prompt if kept else bench.prompt(64, seed=-index), 4)
    bench.finish()
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        bench.add(f"request-{index}", prompt, tokens)
    bench.finish()
    return count * tokens / (time.perf_counter() - began)


@app.command()
def ttft(
    shape: Shape = "8b",
    device: Device = "auto",
    context: Context = 131_072,
    cache: Cache = 3_000_000_000,
    host: Host = 24.0,
    budget: Budget = None,
) -> None:
    """Time to the first token of a prompt that the device's cache does not hold, computed."""
    bench = start(
        shape, device=device, kv_cache_memory_bytes=cache, kv_host_memory_bytes=int(host * GIB),
        max_num_seqs=16, max_model_len=context + _ROOM,
        max_num_batched_tokens=budget,
    )  # fmt: skip
    bench.add("warm-up", bench.prompt(min(8192, context // 2), seed=1), 4)
    bench.finish()
    bench.add("long", bench.prompt(context, seed=2), 16)
    began = time.perf_counter()
    bench.run_until_first_tokens()
    tier = _tier(bench)
    _say(context=context, ttft_s=time.perf_counter() - began, lookups=tier.lookups,
         hit_rate=tier.hits / max(1, tier.lookups), fetched_gb=tier.fetched_bytes / 1e9,
         stall_s=tier.stall_seconds)  # fmt: skip
    show_copies(bench)
    bench.finish()


def _say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


@app.callback()
def _conditions() -> None:
    _say(**environment())


if __name__ == "__main__":
    app()
