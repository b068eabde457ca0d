"""Steps of an engine that streams weights: ``python -m nsa_serve.bench.offload``.

Beside each time stands how much of the copying was hidden behind computation, and the time of the
same steps with all weights on the device.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from ..stats import StreamReport
from .engine_run import BenchEngine
from .latency import Point, decode_steps, time_to_first_token
from .measure import environment

_ROOM = 512  # tokens behind a context, for steps

DECODES = ((1, 4096), (32, 4096))
PREFILL = 8192


@dataclass(frozen=True, slots=True)
class Streaming:
    """What was copied between two moments."""

    before: StreamReport
    after: StreamReport

    @property
    def delta(self) -> StreamReport:
        """The same counts, of the time between alone."""
        return StreamReport(
            self.after.num_bytes - self.before.num_bytes,
            self.after.seconds - self.before.seconds,
            self.after.stall_seconds - self.before.stall_seconds,
        )

    def record(self) -> dict[str, float]:
        """Rate of the link, and the share of the copies' time in which something was computed."""
        found = self.delta
        rate = found.num_bytes / found.seconds / 1e9 if found.seconds else 0.0
        return {"copied_gb": found.num_bytes / 1e9, "gb_per_s": rate, "overlap": found.overlap}


def measure(bench: BenchEngine) -> dict[str, tuple[Point, Streaming]]:
    """Each case's time and what was copied in it."""
    found = {}
    for streams, context in DECODES:
        before = _report(bench)
        point = decode_steps(bench, streams, context, floor=1.0)
        found[f"decode {streams} x {context}"] = point, Streaming(before, _report(bench))
    before = _report(bench)
    point = time_to_first_token(bench, PREFILL, 2, floor=1.0)
    found[f"ttft {PREFILL}"] = point, Streaming(before, _report(bench))
    return found


def rows(
    streamed: dict[str, tuple[Point, Streaming]], resident: dict[str, tuple[Point, Streaming]]
) -> list[dict[str, Any]]:
    """A line for each case. ``resident`` may lack any: where the model doesn't fit."""
    lines = []
    for name, (point, streaming) in streamed.items():
        line: dict[str, Any] = {"case": name, "ms": point.timing.record(), **streaming.record()}
        if name in resident:
            line["resident_ms"] = resident[name][0].timing.median
        lines.append(line)
    return lines


def _report(bench: BenchEngine) -> StreamReport:
    return bench.engine.stats().stream or StreamReport()


def main(
    shape: Annotated[str, typer.Option(help="8b, 135m or a folder.")] = "8b",
    offload: Annotated[float, typer.Option(help="GiB of weights in host memory.")] = 8.0,
    cache: Annotated[int, typer.Option(help="Bytes of the cache.")] = 8 << 30,
    compare: Annotated[bool, typer.Option(help="With all weights on the device, too.")] = True,
) -> None:
    """A JSON line for each case, after one that says where it was measured."""
    print(json.dumps(environment()), flush=True)
    flags: dict[str, Any] = {
        "kv_cache_memory_bytes": cache, "max_num_seqs": 32, "max_model_len": PREFILL + _ROOM,
    }  # fmt: skip
    resident = {}
    if compare:
        bench = BenchEngine.start(shape, **flags)
        resident = measure(bench)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    bench = BenchEngine.start(shape, **flags, cpu_offload_bytes=int(offload * (1 << 30)))
    print(json.dumps({"engine": bench.parts.worker.describe()}), flush=True)
    for line in rows(measure(bench), resident):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
