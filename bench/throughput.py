"""Offline throughput: many requests of stated lengths at once, through a whole engine."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress

from .engine_run import BenchEngine


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine. Lengths vary by ± ``range_ratio``."""

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request."""
        rng = random.Random(self.seed)

        def around(length: int) -> int:
            spread = self.range_ratio * length
            return max(1, round(length + rng.uniform(-spread, spread)))

        return [(around(self.input_len), around(self.output_len)) for _ in range(self.num_prompts)]


def measure(bench: BenchEngine, load: Load) -> dict[str, Any]:
    """Run the load and count; every request must give exactly the tokens it was asked for."""
    lengths = load.lengths()
    prompts = [bench.prompt(size, seed=i) for i, (size, _) in enumerate(lengths)]
    for i, (prompt, (_, output_len)) in enumerate(zip(prompts, lengths, strict=True)):
        bench.add(f"request-{i}", prompt, output_len)
    start = time.perf_counter()
    _run(bench, len(lengths))
    elapsed = time.perf_counter() - start
    generated = {
        name: sum(len(output.token_ids) for output in outputs)
        for name, outputs in bench.outputs.items()
    }
    for i, (_, output_len) in enumerate(lengths):
        assert generated[f"request-{i}"] == output_len, f"request-{i} ended early"
    stats = bench.engine.stats()
    bench.finish()
    num_in = sum(size for size, _ in lengths)
    num_out = sum(size for _, size in lengths)
    return {
        **asdict(load),
        "elapsed_s": elapsed,
        "request_throughput": len(lengths) / elapsed,
        "output_throughput": num_out / elapsed,
        "total_token_throughput": (num_in + num_out) / elapsed,
        "num_preemptions": stats.num_preemptions,
    }


def _run(bench: BenchEngine, num_requests: int) -> None:
    with Progress() as progress:
        task = progress.add_task("requests", total=num_requests)
        while bench.engine.has_work:
            bench.step()
            ended = sum(
                bool(outputs) and outputs[-1].finish_reason is not None
                for outputs in bench.outputs.values()
            )
            progress.update(task, completed=ended)
