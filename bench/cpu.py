"""Speed on a CPU, as ratios to transformers in one run: ``python -m nsa_serve.bench.cpu``.

The same prompts and weights go to both sides, and their greedy tokens are compared before anything
is timed. Absolute times on one CPU say little about another; the ratios do. They are of 10th
percentiles: other processes on the machine add time to either side, and never take any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..config import EngineConfig
from ..engine.engine import Engine
from ..request import EngineRequest, SamplingParams
from .front_end import server_overhead
from .measure import Timing, environment, summarise
from .report import console, save_json, show_table
from .rivals import transformers_llama

RESULT = Path(__file__).parent / "results" / "cpu.json"
WARMUP = 4


@dataclass(frozen=True, slots=True)
class Ratio:
    """One promise: a ratio, what it must reach, and the two times behind it."""

    name: str
    ratio: float
    must: float
    at_most: bool  # the ratio is a cost: it must not exceed ``must``
    ours: Timing
    theirs: Timing

    @property
    def reached(self) -> bool:
        return self.ratio <= self.must if self.at_most else self.ratio >= self.must

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ratio": self.ratio,
            "must": f"{'≤' if self.at_most else '≥'} {self.must}",
            "reached": self.reached,
            "ours_ms": self.ours.record(),
            "theirs_ms": self.theirs.record(),
        }


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random ordinary token ids: timing doesn't depend on the text, and no two prompts share."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 49_000, (num_tokens,), generator=generator).tolist()


def engine(dtype: str, attention: str) -> Engine:
    config = EngineConfig.from_flags(
        dtype=dtype, attention=attention, device="cpu", enable_prefix_caching=False,
        kv_cache_memory_bytes=2 << 30,
    )  # fmt: skip
    return Engine.from_config(config.validate())


class Streams:
    """Requests that generate together on an engine; ``step`` is timed from outside."""

    def __init__(self, engine: Engine, prompts: list[list[int]], max_tokens: int) -> None:
        self.engine = engine
        self.ids = [f"stream-{i}" for i in range(len(prompts))]
        self.tokens: dict[str, list[int]] = {name: [] for name in self.ids}
        self.open = set(self.ids)
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for name, ids in zip(self.ids, prompts, strict=True):
            request = EngineRequest(request_id=name, prompt_token_ids=ids, sampling=sampling)
            engine.add(request, time.monotonic())

    def step(self) -> None:
        for output in self.engine.step(time.monotonic()):
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.open.discard(output.request_id)

    def prefill(self) -> None:
        """Step until every stream has its first token."""
        while any(not tokens for tokens in self.tokens.values()):
            self.step()

    def finish(self) -> None:
        while self.open:
            self.step()


def our_decode(engine: Engine, num_streams: int, context: int, tokens: int) -> list[float]:
    """Milliseconds of each decode step of ``num_streams`` requests at ``context`` tokens."""
    # The first streams decode while the last prefill, and all must last to the end.
    max_tokens = tokens + WARMUP + num_streams + 1
    streams = Streams(engine, [prompt(context, i) for i in range(num_streams)], max_tokens)
    streams.prefill()
    samples = []
    for i in range(tokens + WARMUP):
        start = time.perf_counter()
        streams.step()
        if i >= WARMUP:
            samples.append(1e3 * (time.perf_counter() - start))
    assert len(streams.open) == num_streams, "a stream ended while it was timed"
    streams.finish()
    return samples


@torch.inference_mode()
def their_decode(model: Any, context: int, tokens: int) -> list[float]:
    """Milliseconds of each greedy step of transformers, with its own cache."""
    out = model(torch.tensor([prompt(context, 0)]), use_cache=True, logits_to_keep=1)
    samples = []
    for i in range(tokens + WARMUP):
        start = time.perf_counter()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        if i >= WARMUP:
            samples.append(1e3 * (time.perf_counter() - start))
    return samples


def our_prefill(engine: Engine, num_tokens: int) -> float:
    streams = Streams(engine, [prompt(num_tokens, 7)], 1)
    start = time.perf_counter()
    streams.finish()
    return 1e3 * (time.perf_counter() - start)


@torch.inference_mode()
def their_prefill(model: Any, num_tokens: int) -> float:
    ids = torch.tensor([prompt(num_tokens, 7)])
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - start)


def interleaved(
    ours: Callable[[], list[float]], theirs: Callable[[], list[float]], rounds: int
) -> tuple[Timing, Timing]:
    """Both sides in turn, so that a slow minute of the machine falls on both."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        samples[0].extend(ours())
        samples[1].extend(theirs())
    return summarise(samples[0], WARMUP), summarise(samples[1], WARMUP)


@torch.inference_mode()
def check_same_tokens() -> None:
    """Greedy tokens of both sides on one prompt, dense and in fp32, where they must be equal."""
    streams = Streams(engine("float32", "dense"), [prompt(64, 3)], 16)
    streams.finish()
    ids = torch.tensor([prompt(64, 3)])
    model = transformers_llama(torch.float32)
    model.generation_config.eos_token_id = None
    out = model.generate(ids, max_new_tokens=16, do_sample=False)
    expected = out[0, 64:].tolist()
    if streams.tokens["stream-0"] != expected:
        raise AssertionError(f"greedy tokens differ: {streams.tokens['stream-0']} != {expected}")


def ratios(dtype: str, rounds: int) -> Iterator[Ratio]:
    """Every promise about the CPU for one storage type."""
    model = transformers_llama(getattr(torch, dtype))
    check_same_tokens()
    nsa = engine(dtype, "nsa")

    ours, theirs = interleaved(
        lambda: our_decode(nsa, 1, 512, 24), lambda: their_decode(model, 512, 24), rounds
    )
    yield Ratio("decode, 1 stream at 512", theirs.low / ours.low, 2.0, False, ours, theirs)
    ours, theirs = interleaved(
        lambda: our_decode(nsa, 8, 512, 12), lambda: their_decode(model, 512, 12), rounds
    )
    speedup = 8 * theirs.low / ours.low
    yield Ratio("decode, 8 streams over 1 of theirs", speedup, 7.0, False, ours, theirs)
    ours, theirs = interleaved(
        lambda: [our_prefill(nsa, 4096)], lambda: [their_prefill(model, 4096)], rounds
    )
    yield Ratio("prefill of 4096 tokens", theirs.low / ours.low, 1.5, False, ours, theirs)
    long, short = interleaved(
        lambda: our_decode(nsa, 1, 8000, 16), lambda: our_decode(nsa, 1, 1024, 16), 1
    )
    cost = long.low / short.low
    yield Ratio("NSA decode at 8k over 1k of context", cost, 1.5, True, long, short)
    http, direct = server_overhead(dtype)
    cost = http.low / direct.low
    yield Ratio("8 streams through HTTP over LLM.generate", cost, 1.1, True, http, direct)


def main(
    dtype: Annotated[list[str], typer.Option(help="Storage types to measure.")] = ["bfloat16"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds of each side, in turn.")] = 3,
    save: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULT,
) -> None:
    """Measure the CPU's ratios and save them."""
    record: dict[str, Any] = {"environment": environment(), "ratios": {}}
    for name in dtype:
        with console.status(f"measuring {name}"):
            found = list(ratios(name, rounds))
        record["ratios"][name] = [ratio.record() for ratio in found]
        show_table(
            f"embedded model, {name}, {record['environment']['device']}",
            ("", "ratio", "must", "ours, ms", "theirs, ms", "reached"),
            [
                (r.name, r.ratio, f"{'≤' if r.at_most else '≥'} {r.must}", r.ours.low,
                 r.theirs.low, "yes" if r.reached else "no")
                for r in found
            ],
        )  # fmt: skip
    save_json(save, record)


if __name__ == "__main__":
    typer.run(main)
