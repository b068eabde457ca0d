"""``nsa-serve bench kernels | latency | timeline | throughput``: tables, JSON and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import latency as engine_latency
from . import throughput as engine_throughput
from . import timeline as engine_timeline
from .engine_run import BenchEngine
from .measure import Ceilings, environment, measure_ceilings
from .report import console, save_json, save_plot, show_table

RESULTS = Path("bench-results")
app = typer.Typer()

ShapeOption = Annotated[
    str, typer.Option(help="A shape that ships (8b, 135m) or a folder with a config.json.")
]
DirOption = Annotated[Path, typer.Option("--result-dir", help="Where JSON and plots go.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AttentionOption = Annotated[str, typer.Option(help="auto, nsa or dense.")]
CacheOption = Annotated[
    int | None, typer.Option(help="Bytes of the KV cache; by default what memory is left.")
]


@app.command()
def kernels(
    result_dir: DirOption = RESULTS,
    num_q_heads: Annotated[int, typer.Option(min=1)] = 64,
    num_kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
    length: Annotated[
        list[int] | None, typer.Option(help="Prompt lengths; repeatable. Default 8k to 64k.")
    ] = None,
) -> None:
    """One layer's kernels against torch SDPA: prefill, decode and training, on this GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("bench kernels needs a CUDA GPU, and torch finds none")
    # Triton is an optional part, and absent where there is no GPU.
    from ..kernels.shapes import NSAShape
    from . import kernels as room
    from . import sm_spread, training
    from .synthetic import AttentionShape

    shape, nsa = AttentionShape(num_q_heads, num_kv_heads, head_dim, head_dim), NSAShape()
    ceilings = measure_ceilings()
    rows: list[room.Row] = []
    with console.status("measuring") as status:
        for size in length or room.PREFILL_LENGTHS:
            status.update(f"prefill of {size} tokens")
            rows += room.prefill_rows(shape, nsa, size, ceilings)
            torch.cuda.empty_cache()
        for num_rows, context in room.DECODE_CASES:
            status.update(f"decode, {num_rows} × {context}")
            rows += room.decode_rows(shape, nsa, num_rows, context, ceilings)
            torch.cuda.empty_cache()
        for size in length or room.PREFILL_LENGTHS:
            status.update(f"training, {size} tokens")
            rows += training.training_rows(shape, nsa, size)
            torch.cuda.empty_cache()
    show_table(
        f"one layer, {num_q_heads} query and {num_kv_heads} KV heads of {head_dim}, bf16",
        ("pass", "requests", "context", "ms", "spread", "floor", "× floor", "error", "peak GiB"),
        [
            (f"{r.phase}: {r.name}", r.num_rows, r.context_len, r.timing.median, r.timing.spread,
             r.floor, r.timing.median / r.floor if r.floor else None, r.error,
             r.peak_bytes / 2**30 if r.peak_bytes else None)
            for r in rows
        ],
    )  # fmt: skip
    record = {**_conditions(ceilings), "shape": asdict(shape), "nsa": asdict(nsa)}
    save_json(result_dir / "kernels.json", {**record, "rows": [row.record() for row in rows]})
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.phase == "prefill":
            lines[row.name].append((row.context_len, row.timing.median))
    save_plot(result_dir / "kernels_prefill.png", "Prefill, one layer", "ms", lines)
    longest = max(length or room.PREFILL_LENGTHS)
    spreads = sm_spread.measure(longest)
    if spreads:
        show_table(
            f"cycles that multiprocessors are active, a prompt of {longest} tokens",
            ("kernel", "most", "mean", "spread"),
            [(s.kernel, s.most, s.mean, s.share) for s in spreads],
        )
        launches = [s.record() for s in spreads]
        save_json(result_dir / "sm_spread.json", {**record, "length": longest, "rows": launches})


@app.command()
def latency(
    shape: ShapeOption = "8b",
    attention: AttentionOption = "auto",
    device: DeviceOption = "auto",
    result_dir: DirOption = RESULTS,
    kv_cache_memory_bytes: CacheOption = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context served.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step: the size of a prefill chunk.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts timed for each TTFT.")] = 3,
    ttft: Annotated[
        list[int] | None, typer.Option(help="Prompt lengths; repeatable. Default 8k to 256k.")
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(help="Decode steps, as REQUESTSxCONTEXT (8x65536); repeatable."),
    ] = None,
) -> None:
    """Time to first token and decode steps of a whole engine, random weights, by context."""
    lengths = tuple(ttft or engine_latency.TTFT_LENGTHS)
    cases = tuple(parse_case(case) for case in decode or ()) or engine_latency.DECODE_CASES
    bench = BenchEngine.start(
        shape, attention=attention, device=device, kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip
    console.print(f"{shape}: {bench.parts.worker.describe()}; ready in {bench.load_seconds:.1f} s")
    ceilings = _ceilings()
    points = []
    with console.status("measuring") as status:
        for point in engine_latency.measure(
            bench, ceilings, ttft=lengths, decode=cases, repeats=repeats
        ):
            status.update(f"{point.what}, {point.num_requests} × {point.context_len}")
            points.append(point)
    show_table(
        f"engine, shape {shape}, {bench.parts.description.attention}",
        ("", "requests", "context", "ms", "p99", "spread", "floor", "× floor", "tokens/s"),
        [
            (p.what, p.num_requests, p.context_len, p.timing.median, p.p99, p.timing.spread,
             p.floor, p.timing.median / p.floor, p.record()["tokens_per_s"])
            for p in points
        ],
    )  # fmt: skip
    record = {**_conditions(ceilings), **_engine_conditions(shape, bench)}
    name = f"latency_{Path(shape).name}_{bench.parts.description.attention}"
    save_json(result_dir / f"{name}.json", {**record, "points": [p.record() for p in points]})
    _plot_points(result_dir, name, points)


def _plot_points(result_dir: Path, name: str, points: Sequence[engine_latency.Point]) -> None:
    """Two plots over context: time to the first token, and a step by how many requests decode."""
    prefill = [p for p in points if p.what == "ttft"]
    if prefill:
        line = [(p.context_len, p.timing.median) for p in prefill]
        floor = [(p.context_len, p.floor) for p in prefill]
        save_plot(result_dir / f"{name}.png", "Time to first token", "ms", {"TTFT": line}, floor)
    steps: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in sorted(points, key=lambda p: p.context_len):
        if point.what == "decode":
            steps[f"{point.num_requests} requests"].append((point.context_len, point.timing.median))
    if steps:
        save_plot(result_dir / f"{name}_decode.png", "Decode step", "ms", steps)


def parse_case(text: str) -> tuple[int, int]:
    """(requests, context) of ``8x65536``. Raises ``typer.BadParameter`` for anything else."""
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    raise typer.BadParameter(f"{text!r} is not REQUESTSxCONTEXT, such as 8x65536")


@app.command()
def timeline(
    shape: ShapeOption = "8b",
    attention: AttentionOption = "auto",
    result_dir: DirOption = RESULTS,
    case: Annotated[
        list[str] | None, typer.Option(help="REQUESTSxCONTEXT, such as 8x65536; repeatable.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context served.")] = None,
    trace: Annotated[
        bool, typer.Option(help="Save the profiles too, for chrome://tracing or Perfetto.")
    ] = False,
) -> None:
    """How busy the GPU is in decode steps, and with what: a profile of the running engine."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("bench timeline needs a CUDA GPU, and torch finds none")
    cases = [parse_case(text) for text in case or ("1x1024", "40x65536", "256x1024")]
    bench = BenchEngine.start(
        shape, attention=attention, device="cuda", max_model_len=max_model_len
    )
    bench.fill_caches()
    found = []
    for num_requests, context in cases:
        name = f"timeline_{Path(shape).name}_{num_requests}x{context}.json.gz"
        path = result_dir / name if trace else None
        steps = engine_timeline.record_steps(bench, num_requests, context, path)
        show_table(
            f"{num_requests} × {context}: {steps.busy_ms:.2f} of {steps.step_ms:.2f} ms busy",
            ("kernel", "ms a step"),
            list(steps.by_kernel.items()),
        )
        found.append(steps.record())
    record = {**_conditions(None), **_engine_conditions(shape, bench)}
    save_json(result_dir / f"timeline_{Path(shape).name}.json", {**record, "timelines": found})


@app.command()
def throughput(
    shape: ShapeOption = "8b",
    attention: AttentionOption = "auto",
    device: DeviceOption = "auto",
    num_prompts: Annotated[int, typer.Option(min=1)] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    range_ratio: Annotated[float, typer.Option(min=0, max=1, help="Lengths vary by ±.")] = 0.0,
    seed: int = 0,
    kv_cache_memory_bytes: CacheOption = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests in a step.")] = 256,
    result_dir: DirOption = RESULTS,
) -> None:
    """Tokens per second of many requests at once, offline, random weights."""
    bench = BenchEngine.start(
        shape, attention=attention, device=device, kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_num_seqs=max_num_seqs, max_num_queued_reqs=num_prompts,
    )  # fmt: skip
    load = engine_throughput.Load(num_prompts, input_len, output_len, range_ratio, seed)
    warm = engine_throughput.Load(min(4, num_prompts), 64, 4, seed=seed + 1)
    engine_throughput.measure(bench, warm)
    found = engine_throughput.measure(bench, load)
    show_table(
        f"throughput, shape {shape}, {bench.parts.description.attention}", ("", ""), found.items()
    )
    record = {**_conditions(None), **_engine_conditions(shape, bench), **found}
    save_json(result_dir / f"throughput_{Path(shape).name}.json", record)


def _ceilings() -> Ceilings:
    if torch.cuda.is_available():
        return measure_ceilings()
    raise typer.BadParameter("bench latency needs a CUDA GPU; see nsa_serve.bench.cpu for a CPU")


def _conditions(ceilings: Ceilings | None) -> dict[str, Any]:
    found: dict[str, Any] = {"environment": environment()}
    return found if ceilings is None else {**found, "ceilings": asdict(ceilings)}


def _engine_conditions(shape: str, bench: BenchEngine) -> dict[str, Any]:
    worker = bench.parts.worker
    return {
        "shape": shape,
        "attention": bench.parts.description.attention,
        "dtype": worker.dtype_name,
        "weight_bytes": worker.num_weight_bytes,
        "cache_bytes": worker.num_cache_bytes,
        "token_budget": worker.token_budget,
        "max_model_len": worker.max_model_len,
        "load_seconds": bench.load_seconds,
        **bench.memory(),
    }
