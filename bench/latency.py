"""Time to first token and decode steps of a whole engine with random weights, by context."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import cost
from ..models.config import ModelConfig
from .engine_run import BenchEngine
from .measure import Ceilings, Timing, summarise

TTFT_LENGTHS = (8192, 65536, 131072, 262144)
DECODE_CASES = (
    (1, 1024), (1, 65536), (8, 65536), (16, 65536), (40, 65536), (32, 8192), (128, 8192),
    (128, 1024), (256, 1024),
)  # fmt: skip
WARMUP_STEPS = 8
STEPS = 48
# Longer prompts take minutes to run twice. What is new to one, a variant of a kernel for twice as
# many blocks, takes about a second to compile.
LONGEST_WARMUP = 262144
# A conversation whose cached context grows by a turn: (cached tokens, new tokens), and how often.
TURN = (65536, 512)
NUM_TURNS = 200


@dataclass(frozen=True, slots=True)
class Point:
    """One measured case of the engine."""

    what: str  # ttft, turn or decode
    num_requests: int
    context_len: int
    timing: Timing  # ms: to the first token, or of a step
    floor: float  # ms
    peak_bytes: int  # of the device while the case ran, torch's high-water mark
    p99: float | None = None  # ms, where there are samples enough

    def record(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "num_requests": self.num_requests,
            "context_len": self.context_len,
            "ms": self.timing.record(),
            "floor_ms": self.floor,
            "achieved_over_floor": self.timing.median / self.floor,
            "tokens_per_s": self._tokens() / self.timing.median * 1e3,
            "peak_bytes": self.peak_bytes,
            "p99_ms": self.p99,
        }

    def _tokens(self) -> int:
        if self.what == "turn":
            return TURN[1]
        return self.num_requests * (self.context_len if self.what == "ttft" else 1)


def time_to_first_token(bench: BenchEngine, length: int, repeats: int, floor: float) -> Point:
    """A prompt of ``length`` tokens on an idle engine, from add to the first token."""
    _forget_peak()
    samples = []
    for i in range(repeats + 1):
        warmup = i == 0
        prompt = bench.prompt(min(length, LONGEST_WARMUP) if warmup else length, seed=length + i)
        samples.append(_first_token_ms(bench, f"ttft-{i}", prompt))
        bench.parts.scheduler.reset_prefix_cache()
    return Point("ttft", 1, length, summarise(samples[1:], 1), floor, _peak())


def new_turns(bench: BenchEngine, cached: int, new: int, turns: int, floor: float) -> Point:
    """TTFT of ``new`` tokens behind ``cached`` ones that the prefix cache holds."""
    _forget_peak()
    prompt = bench.prompt(cached, seed=cached)
    bench.pretend_cached(prompt)
    samples = []
    for i in range(turns + 1):
        turn = prompt + bench.prompt(new, seed=cached + 1 + i)
        samples.append(_first_token_ms(bench, f"turn-{i}", turn))
    bench.parts.scheduler.reset_prefix_cache()
    p99 = sorted(samples[1:])[math.ceil(0.99 * turns) - 1]
    return Point("turn", 1, cached, summarise(samples[1:], 1), floor, _peak(), p99)


def _first_token_ms(bench: BenchEngine, name: str, prompt: list[int]) -> float:
    start = time.perf_counter()
    bench.add(name, prompt, max_tokens=1)
    bench.run_until_first_tokens()
    elapsed = time.perf_counter() - start
    bench.finish()
    return 1e3 * elapsed


def decode_steps(bench: BenchEngine, num_requests: int, context: int, floor: float) -> Point:
    """Steps of ``num_requests`` requests at ``context`` tokens each, one token a request."""
    _forget_peak()
    bench.start_decodes(num_requests, context, WARMUP_STEPS + STEPS + 4)
    samples = bench.timed_steps(WARMUP_STEPS + STEPS)[WARMUP_STEPS:]
    bench.finish()
    bench.parts.scheduler.reset_prefix_cache()
    return Point("decode", num_requests, context, summarise(samples, WARMUP_STEPS), floor, _peak())


def measure(
    bench: BenchEngine,
    ceilings: Ceilings,
    *,
    ttft: tuple[int, ...] = TTFT_LENGTHS,
    decode: tuple[tuple[int, int], ...] = DECODE_CASES,
    repeats: int = 3,
) -> Iterator[Point]:
    """Every case that the engine's context and cache hold; the others are left out, and said so."""
    worker = bench.parts.worker
    model: ModelConfig = worker.model_config
    limit = worker.max_model_len - WARMUP_STEPS - STEPS - 8
    room = worker.num_blocks * worker.page
    bench.fill_caches()
    for length in ttft:
        if length <= limit:
            floor = prefill_floor(model, length, ceilings)
            yield time_to_first_token(bench, length, repeats, floor)
    cached, new = TURN
    if cached + new <= limit and cached + (NUM_TURNS + 2) * (new + worker.page) <= room:
        floor = turn_floor(model, worker.num_weight_bytes, new, ceilings)
        yield new_turns(bench, cached, new, NUM_TURNS, floor)
    for num_requests, context in decode:
        pages = -(-(context + WARMUP_STEPS + STEPS + 8) // worker.page) + 1
        if context <= limit and num_requests * pages * worker.page <= room:
            floor = decode_floor(model, worker.num_weight_bytes, num_requests, context, ceilings)
            yield decode_steps(bench, num_requests, context, floor)


def linear_flops_per_token(model: ModelConfig) -> int:
    """Multiply-adds of the layers' linear parts, counted as two; without the output layer."""
    attention = model.num_q_heads * (model.head_dim_k + model.head_dim_v)
    attention += model.num_kv_heads * (model.head_dim_k + model.head_dim_v)
    per_layer = model.hidden_size * (attention + 3 * model.intermediate_size)
    return 2 * model.num_layers * per_layer


def prefill_floor(model: ModelConfig, length: int, ceilings: Ceilings) -> float:
    """ms: linear layers and attention at the measured matrix rate."""
    flops = length * linear_flops_per_token(model)
    if model.nsa is None:
        heads = cost.Heads(
            model.num_q_heads, model.num_kv_heads, model.head_dim_k, model.head_dim_v
        )
        flops += model.num_layers * cost.dense_attention(heads, [cost.Row(length, length)]).flops
    else:
        flops += model.num_layers * cost.prefill(model, model.nsa.shape, length)["layer"].flops
    return 1e3 * flops / ceilings.flops_per_s


def turn_floor(model: ModelConfig, weight_bytes: int, new: int, ceilings: Ceilings) -> float:
    """ms: linear layers of the new tokens at the measured matrix rate, or the weights read once."""
    products = new * linear_flops_per_token(model) / ceilings.flops_per_s
    return 1e3 * max(products, weight_bytes / ceilings.bytes_per_s)


def decode_floor(
    model: ModelConfig, weight_bytes: int, num_requests: int, context: int, ceilings: Ceilings
) -> float:
    """ms: the weights and what the attention must read, once, at the measured bandwidth."""
    if model.nsa is None:
        per_token = 2 * model.num_kv_heads * (model.head_dim_k + model.head_dim_v)
        cache_bytes = num_requests * context * per_token
    else:
        cache_bytes = cost.decode(model, model.nsa.shape, num_requests, context)["layer"].bytes
    embedding = 2 * model.vocab_size * model.hidden_size
    read = weight_bytes + model.num_layers * cache_bytes
    # The input embedding is looked up, not read; tied, it is the output layer and read.
    return 1e3 * (read - (0 if model.tie_embeddings else embedding)) / ceilings.bytes_per_s


def _forget_peak() -> None:
    """What came before, such as the buffers of the measured ceilings, is no part of a case."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
