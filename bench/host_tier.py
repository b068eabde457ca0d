"""Decode attention of one layer whose far pages lie in host memory, by hit rate of the hot blocks.

Selections are replayed: each token keeps the free choices of the step before but for a share, which
is drawn from pages not chosen lately, so that the hit rate is what was asked for. Beside each time
stands what the link to the host would take for the missed bytes alone.
Run it as ``python -m nsa_serve.bench.host_tier``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Annotated

import torch
import typer

from ..kernels.dispatch import ops_for
from ..kernels.shapes import NSAShape, StepBatch
from ..memory.device_pool import DevicePool
from ..memory.host_pool import HostPool, PinnedMemory
from ..memory.layout import KVLayout
from ..memory.tier import HostTier
from ..models.step import StepInputs
from ..schedule.plan import ResidenceUpdate
from .measure import Timing, captured, environment, summarise
from .synthetic import AttentionShape

HIT_RATES = (0.85, 0.90, 0.95, 0.99)
_WARMUP = 8  # steps in which the hot blocks fill
Moment = torch.cuda.Event | float


@dataclass(frozen=True, slots=True)
class TierCase:
    """Streams of one context, their far pages in host memory, one query token each."""

    nsa: NSAShape
    tier: HostTier
    batch: StepBatch
    q: torch.Tensor  # [B, Hq, Dk]
    far: range  # pages that lie in host memory


@dataclass(frozen=True, slots=True)
class TierRow:
    """What the steps of one hit rate took, and what they moved."""

    asked: float
    hit_rate: float
    fetched_bytes: int  # a step
    begin: Timing  # once a step, for all layers
    fetch: Timing  # look-up and fetch
    attention: Timing
    link_ms: float  # the link's time for the fetched bytes

    @property
    def over_link(self) -> float:
        return self.fetch.median / self.link_ms if self.link_ms else 0.0


def build_case(
    num_streams: int,
    context_len: int,
    shape: AttentionShape,
    device: torch.device,
    *,
    nsa: NSAShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    hot_per_stream: int = 32,
) -> TierCase:
    """Pools of one layer: near pages on the device, hot slots behind them, the rest on the host."""
    nsa = nsa or NSAShape()
    layout = KVLayout(
        1, shape.num_kv_heads, shape.head_dim_k, shape.head_dim_v, nsa.page, nsa.entries_per_page,
        dtype,
    )  # fmt: skip
    pages = context_len // nsa.page
    far = range(nsa.num_initial, pages - nsa.window // nsa.page - 1)
    num_near, num_hot = num_streams * (pages - len(far)), num_streams * hot_per_stream
    num_host = num_streams * len(far)
    on_cuda = device.type == "cuda"
    pool = DevicePool(
        layout, num_near + num_hot, num_streams * pages, device, num_host=0 if on_cuda else num_host
    )
    raw = pool.behind
    if on_cuda:
        raw = PinnedMemory(num_host * layout.bytes_per_slot).wait().view(dtype)
    host = HostPool(layout, raw)
    for pages_of in (pool.pages, host.pages):
        _fill(pages_of, device)
    tier = HostTier(pool, host, slab=1, num_hot=num_hot)
    near_slots, host_slots = iter(range(num_near)), iter(range(num_host))
    slots = [
        pool.num_slots + next(host_slots) if block % pages in far else next(near_slots)
        for block in range(num_streams * pages)
    ]
    tier.note(ResidenceUpdate([], list(enumerate(slots)), True))
    tier.catch_up()
    blocks = torch.arange(num_streams * pages, dtype=torch.int32, device=device)
    table = blocks.view(num_streams, pages)
    rows = torch.arange(num_streams + 1, dtype=torch.int32, device=device)
    batch = StepBatch(
        positions=torch.full((num_streams,), context_len - 1, device=device),
        token_rows=rows[:-1],
        cu_seqlens_q=rows,
        context_lens=torch.full((num_streams,), context_len, dtype=torch.int32, device=device),
        block_table=table,
        slot_table=pool.slots_of(table),
        max_query_len=1,
        max_context_len=context_len,
    )
    q = torch.randn(
        num_streams, shape.num_q_heads, shape.head_dim_k, device=device, dtype=torch.float32
    )
    return TierCase(nsa, tier, batch, q.to(dtype), far)


def _fill(pages: torch.Tensor, device: torch.device) -> None:
    """Random values, drawn on the device: the host would take a minute for some gigabytes."""
    noise = torch.randn(min(512, len(pages)), pages.shape[1], device=device).to(pages.dtype)
    for first in range(0, len(pages), len(noise)):
        part = pages[first : first + len(noise)]
        part.copy_(noise[: len(part)])


def replayed(case: TierCase, hit_rate: float, num_steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Selections [B, Hkv, n] of ``num_steps`` steps that find this share of far pages hot."""
    draw = random.Random(f"{hit_rate} {seed}")
    nsa, (tokens, heads) = case.nsa, (case.q.shape[0], case.tier.pool.layout.num_kv_heads)
    last = case.batch.max_context_len // nsa.page
    forced = [*range(nsa.num_initial), *range(last - nsa.num_local, last)]
    free = nsa.num_selected - len(forced)
    orders = [draw.sample(case.far, len(case.far)) for _ in range(tokens * heads)]
    cursors = [free] * len(orders)
    chosen = [order[:free] for order in orders]
    steps = []
    for _ in range(num_steps):
        for line, order in enumerate(orders):
            for place in range(free):
                if draw.random() >= hit_rate:
                    # The next in a fixed order: chosen longest ago, or never.
                    chosen[line][place] = order[cursors[line] % len(order)]
                    cursors[line] += 1
        lists = [sorted({*forced, *pages}) for pages in chosen]
        padded = [pages + [-1] * (nsa.num_selected - len(pages)) for pages in lists]
        selection = torch.tensor(padded, dtype=torch.int32, device=case.q.device)
        steps.append(selection.view(tokens, heads, nsa.num_selected))
    return steps


def measure_rate(case: TierCase, hit_rate: float, link: float, num_steps: int) -> TierRow:
    """Time the steps of one hit rate; ``link`` in bytes a second."""
    steps = replayed(case, hit_rate, _WARMUP + num_steps)
    asked = steps[0].clone()
    passes = _passes(case, asked)
    clock = _Clock(case.q.device)
    spans: list[list[tuple[Moment, Moment]]] = [[] for _ in passes]
    before = case.tier.counts.clone()
    for step, selection in enumerate(steps):
        if step == _WARMUP:
            before = case.tier.counts.clone()
        asked.copy_(selection)
        last = clock.now()
        for run, times in zip(passes, spans, strict=True):
            run()
            now = clock.now()
            times.append((last, now))
            last = now
    lookups, hits, fetched = (case.tier.counts - before)[:3].tolist()
    begin, fetch, attention = (clock.timing(times[_WARMUP:]) for times in spans)
    pool = case.tier.pool
    piece = pool.layout.bytes_per_slot // pool.layout.num_kv_heads
    num_bytes = fetched * piece // num_steps
    return TierRow(
        hit_rate,
        hits / lookups,
        num_bytes,
        begin,
        fetch,
        attention,
        1e3 * num_bytes / link,
    )


def _passes(case: TierCase, asked: torch.Tensor) -> list[Callable[[], object]]:
    """A step's beginning, its fetch of ``asked`` and its attention; on a GPU each is a graph."""
    ops = ops_for(case.q.device)
    inputs = StepInputs(case.q, case.batch, case.tier.pool.kv, None, case.batch.token_rows)
    served = case.tier.serve(inputs)
    found: list[torch.Tensor | None] = [None]

    def fetch() -> None:
        found[0] = served.ensure_resident(0, asked)

    def attend() -> None:
        ops.selected_attention(
            case.q, served.kv[0], asked, case.batch, nsa=case.nsa, slots=found[0]
        )

    passes: list[Callable[[], object]] = [partial(case.tier.serve, inputs), fetch, attend]
    if case.q.device.type != "cuda":
        return passes
    return [captured(run).replay for run in passes]


class _Clock:
    """Moments on a device's queue, or on the host's clock where the device is the host."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def now(self) -> Moment:
        if not self._on_cuda:
            return perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def timing(self, spans: Sequence[tuple[Moment, Moment]]) -> Timing:
        """Milliseconds between the two moments of each span."""
        if self._on_cuda:
            torch.cuda.synchronize()
        return summarise([self._ms(*span) for span in spans], _WARMUP)

    def _ms(self, start: Moment, end: Moment) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(start.elapsed_time(end))
        assert isinstance(start, float)
        assert isinstance(end, float)
        return 1e3 * (end - start)


def main(
    streams: Annotated[int, typer.Option(help="Decoding requests.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 65536,
    kv_heads: Annotated[int, typer.Option(help="KV heads; each has 16 query heads.")] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps of each hit rate.")] = 50,
    link: Annotated[float, typer.Option(help="GB/s of the link to the host.")] = 51.0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    """One JSON line for each hit rate, after one that says where it was measured."""
    shape = AttentionShape(16 * kv_heads, kv_heads)
    case = build_case(streams, context, shape, torch.device(device))
    conditions = {"streams": streams, "context": context, "kv_heads": kv_heads, "link_gb_s": link}
    print(json.dumps({**environment(), **conditions}))
    for rate in HIT_RATES:
        row = measure_rate(case, rate, link * 1e9, steps)
        print(json.dumps({**asdict(row), "over_link": row.over_link}))


if __name__ == "__main__":
    typer.run(main)
