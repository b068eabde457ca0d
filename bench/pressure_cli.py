"""``python -m nsa_serve.bench.pressure_cli``: the loads of pressure.py, simulated or for real."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..request import EngineRequest, FinishReason, SamplingParams
from .engine_run import BenchEngine
from .measure import environment
from .pressure import FACTORS, Pressed, Served, Work, beside_long, oversubscribed, summary
from .report import save_json, show_table
from .simulated import H200_8B, Came, SimulatedEngine

RESULTS = Path("bench-results")
PAGE = 64


class TimedEngine:
    """A whole engine with random weights, as pressure.py wants it.

    On a CPU its clock is the CPU time of one thread, which others on the machine add nothing to.
    Where a request's length isn't to be known beforehand, any of a random share of the vocabulary
    ends it.
    """

    def __init__(self, bench: BenchEngine) -> None:
        self.bench = bench
        worker = bench.parts.worker
        self.num_tokens = worker.num_blocks * worker.page
        self._num_added = 0
        self._clock = time.monotonic
        if worker.device.type == "cpu":
            torch.set_num_threads(1)
            self._clock = time.process_time

    @property
    def now(self) -> float:
        return self._clock()

    @property
    def has_work(self) -> bool:
        return self.bench.engine.has_work

    def add(
        self, name: str, num_prompt: int, length: int, *, max_tokens: int | None = None
    ) -> None:
        self._num_added += 1
        stops = () if max_tokens is None else self._stops(length)
        sampling = SamplingParams(
            temperature=0.0 if max_tokens is None else 1.0,
            seed=self._num_added,
            max_tokens=max_tokens or length,
            ignore_eos=True,
            stop_token_ids=stops,
        )
        prompt = self.bench.prompt(num_prompt, seed=self._num_added)
        request = EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
        self.bench.engine.add(request, self.now)

    def turn(self) -> list[Came]:
        outputs = self.bench.engine.step(self.now)
        failed = [output for output in outputs if output.finish_reason is FinishReason.ERROR]
        if failed:
            raise RuntimeError(f"{failed[0].request_id} failed: {failed[0].error}")
        now = self.now
        return [
            Came(output.request_id, len(output.token_ids), now, output.finish_reason is not None)
            for output in outputs
        ]

    @property
    def num_preemptions(self) -> int:
        return self.bench.engine.stats().num_preemptions

    def _stops(self, length: int) -> tuple[int, ...]:
        """So many tokens that about each ``length``-th is one of them."""
        vocab = self.bench.parts.description.vocab_size
        return tuple(random.Random(length).sample(range(vocab), max(1, vocab // length)))


app = typer.Typer(no_args_is_help=True, help="Behaviour under pressure.")

ShapeOption = Annotated[
    str | None, typer.Option(help="8b, 135m or a folder; left out: a simulated H200.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
CacheOption = Annotated[int | None, typer.Option(help="Bytes of the engine's cache.")]
BudgetOption = Annotated[int, typer.Option(help="Tokens of a step: a whole chunk.")]
DirOption = Annotated[Path, typer.Option("--result-dir", help="Where the JSON goes.")]


@app.command("beside-long")
def measure_beside_long(
    shape: ShapeOption = None,
    device: DeviceOption = "auto",
    kv_cache_memory_bytes: CacheOption = None,
    max_num_batched_tokens: BudgetOption = 8192,
    long_len: Annotated[int, typer.Option(help="Tokens of the long prompts.")] = 131_072,
    short_len: Annotated[int, typer.Option(help="Tokens of the short prompts.")] = 128,
    num_trials: Annotated[int, typer.Option(help="Short requests.")] = 400,
    num_decoding: Annotated[int, typer.Option(help="Requests that decode all the while.")] = 0,
    result_dir: DirOption = RESULTS,
) -> None:
    """Time to the first token of short requests while long prompts prefill, in whole chunks."""
    if shape is None:
        engine: Served = SimulatedEngine(
            H200_8B, num_blocks=50_000, token_budget=max_num_batched_tokens
        )
        conditions: dict[str, Any] = {"simulated": asdict(H200_8B)}
    else:
        engine = _warm_engine(
            shape, long_len, device=device, kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=long_len + PAGE, max_num_seqs=num_decoding + 4,
        )  # fmt: skip
        conditions = _conditions(shape, engine.bench)
    found = beside_long(
        engine, long_len=long_len, short_len=short_len, token_budget=max_num_batched_tokens,
        num_trials=num_trials, num_decoding=num_decoding,
    )  # fmt: skip
    show_table("short requests beside long prompts", ("", ""), list(found.record().items()))
    conditions["num_decoding"] = num_decoding
    name = f"beside_long_{Path(shape or 'simulated').name}_{num_decoding}.json"
    save_json(result_dir / name, {**conditions, **found.record()})


@app.command("oversubscribed")
def measure_oversubscribed(
    shape: ShapeOption = None,
    device: DeviceOption = "auto",
    kv_cache_memory_bytes: CacheOption = None,
    max_num_batched_tokens: BudgetOption = 8192,
    num_requests: Annotated[int, typer.Option(help="Requests for each point.")] = 400,
    prompt_len: Annotated[int, typer.Option(help="Mean of the prompts' tokens.")] = 512,
    output_len: Annotated[int, typer.Option(help="Mean of the outputs' tokens.")] = 512,
    knows: Annotated[bool, typer.Option(help="max_tokens says how long an output gets.")] = False,
    kv_host_memory_bytes: Annotated[int, typer.Option(help="Bytes of the host tier.")] = 0,
    result_dir: DirOption = RESULTS,
) -> None:
    """Output tokens a second while up to three times as much is open as the cache holds.

    The simulated cache holds 80 requests.
    """
    work = Work(num_requests, prompt_len, output_len, knows)
    conditions: dict[str, Any] = {
        "work": asdict(work), "kv_host_memory_bytes": kv_host_memory_bytes,
    }  # fmt: skip
    found: list[Pressed] = []
    if shape is None:
        num_blocks = 80 * (prompt_len + output_len) // PAGE
        for factor in FACTORS:
            simulated = SimulatedEngine(
                H200_8B, num_blocks=num_blocks, token_budget=max_num_batched_tokens
            )
            found.append(oversubscribed(simulated, work, factor))
        conditions["simulated"] = asdict(H200_8B)
    else:
        engine = _warm_engine(
            shape, prompt_len, device=device, kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=2 * prompt_len + 4 * output_len, max_num_queued_reqs=num_requests,
            kv_host_memory_bytes=kv_host_memory_bytes,
        )  # fmt: skip
        conditions |= _conditions(shape, engine.bench)
        for factor in FACTORS:
            found.append(oversubscribed(engine, work, factor))
            print(f"{factor:g} × what fits: {found[-1].output_tokens_per_s:,.0f} tokens/s")
            engine.bench.parts.scheduler.reset_prefix_cache()
    columns = ("open / what fits", "open", "output tokens/s", "preempted", "share of the best")
    best = max(point.output_tokens_per_s for point in found)
    rows = [
        (
            p.factor, p.num_open, p.output_tokens_per_s, p.num_preemptions,
            p.output_tokens_per_s / best,
        )
        for p in found
    ]  # fmt: skip
    show_table("throughput over a cache that is too small", columns, rows)
    tier = "_host_tier" if kv_host_memory_bytes else ""
    name = f"oversubscribed_{Path(shape or 'simulated').name}{tier}.json"
    save_json(result_dir / name, {**conditions, **summary(found)})


def _warm_engine(shape: str, num_prompt: int, **flags: Any) -> TimedEngine:
    """After one request of so many tokens: kernels are compiled and memory was touched."""
    engine = TimedEngine(BenchEngine.start(shape, **flags))
    engine.add("warm-up", num_prompt, 4)
    while engine.has_work:
        engine.turn()
    return engine


def _conditions(shape: str, bench: BenchEngine) -> dict[str, Any]:
    worker = bench.parts.worker
    return {
        "environment": environment(),
        "shape": shape,
        "attention": bench.parts.description.attention,
        "dtype": worker.dtype_name,
        "clock": "CPU time of one thread" if worker.device.type == "cpu" else "monotonic",
        "cache_tokens": worker.num_blocks * worker.page,
        "token_budget": worker.token_budget,
    }


if __name__ == "__main__":
    app()
