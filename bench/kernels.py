"""Kernels against the attention of torch and xformers, in one run, each checked before it is timed.

Prefill: one prompt of T tokens. Decode: B requests of one token each, in a CUDA graph of several
layers, so that what one costs is what it costs in a step: no layer finds its cache in L2. Both
sides read the same heads and lengths; ours includes the merged write, the compression, all three
branches, the selection and the gates. Every pass is reported beside its floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..kernels import cost, gpu, reference
from ..kernels.shapes import Compressor, NSAShape, StepBatch
from .attention_rivals import rival_decode, rival_prefill
from .measure import Ceilings, Timing, floor_ms, time_device, time_graph
from .synthetic import AttentionShape, Case, local_selection, make_case

Tensor = torch.Tensor
PREFILL_LENGTHS = (8192, 16384, 32768, 65536)
DECODE_CASES = ((1, 65536), (8, 65536), (32, 65536), (128, 8192), (256, 1024))
# How much of its neighbour's free choices a token keeps: none (worst), 70 %, as a trained model.
LOCALITIES = (0.0, 0.7, 0.9)
TOLERANCE = 1e-2  # ‖out − reference‖ / ‖reference‖ in bf16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a pass at a size, its time, and the floor under it."""

    phase: str  # prefill, decode or training
    name: str
    num_rows: int
    context_len: int
    timing: Timing
    floor: float | None = None  # ms
    error: float | None = None  # relative, against the reference
    peak_bytes: int | None = None  # of a training step of the layer

    def record(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "name": self.name,
            "num_rows": self.num_rows,
            "context_len": self.context_len,
            "ms": self.timing.record(),
            "floor_ms": self.floor,
            "achieved_over_floor": self.timing.median / self.floor if self.floor else None,
            "relative_error": self.error,
            "peak_bytes": self.peak_bytes,
        }


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖, NaN where either has one."""
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm().clamp_min(1e-30))


def must_agree(name: str, out: Tensor, expected: Tensor) -> float:
    """The relative error; a figure is not printed for a result that is wrong."""
    error = relative_error(out, expected)
    if not error <= TOLERANCE:
        raise AssertionError(f"{name} is off by {error:.2e} (tolerance {TOLERANCE:.0e}): not timed")
    return error


def tail(case: Case, count: int) -> tuple[slice, StepBatch]:
    """The last ``count`` tokens of a one-row prefill, as a batch of their own for the reference."""
    last = slice(case.batch.num_tokens - count, None)
    batch = replace(
        case.batch,
        positions=case.batch.positions[last],
        token_rows=case.batch.token_rows[last],
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=case.q.device),
        max_query_len=count,
    )
    return last, batch


def prefill_rows(
    shape: AttentionShape, nsa: NSAShape, length: int, ceilings: Ceilings
) -> Iterator[Row]:
    """Every pass over one prompt of ``length`` tokens."""
    case = make_case(
        shape, nsa, num_rows=1, context_len=length, query_len=length, device="cuda",
        dtype=torch.bfloat16,
    )  # fmt: skip

    def row(name: str, run: Callable[[], object], floor: float | None, error: float | None) -> Row:
        repeats = 5 if length >= 32768 else 10
        timing = time_device(run, repeats=repeats, warmup=2)
        return Row("prefill", name, 1, length, timing, floor, error)

    yield from (
        Row("prefill", name, 1, length, timing, None) for name, timing in rival_prefill(case)
    )
    floors = cost.prefill(shape, nsa, length)
    compressor = Compressor()

    def write() -> None:
        gpu.kv_write(
            case.k, case.v, case.kv, case.compressed, case.batch, nsa=nsa, compressor=compressor
        )

    write()
    yield row("kv_write", write, floor_ms(floors["kv_write"], ceilings), None)

    out, selection = gpu.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    last, batch = tail(case, 32)
    expected, _ = reference.compressed_attention(case.q[last], case.compressed, batch, nsa=nsa)
    assert out is not None
    assert expected is not None
    yield row(
        "compressed + select",
        lambda: gpu.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa),
        floor_ms(floors["compressed_attention"], ceilings),
        must_agree("compressed_attention", out[last], expected),
    )
    for keep in LOCALITIES:
        selection = local_selection(case.batch.positions, shape.num_kv_heads, nsa, keep)
        yield _sparse_row(case, selection, out, keep, row, floor_ms(floors["sparse"], ceilings))


def _sparse_row(
    case: Case,
    selection: Tensor,
    out_compressed: Tensor,
    keep: float,
    row: Callable[..., Row],
    floor: float,
) -> Row:
    def run() -> Tensor:
        return gpu.sparse_attention(
            case.q, case.kv, selection, out_compressed, case.gate_logits, case.batch, nsa=case.nsa
        )

    last, batch = tail(case, 32)
    expected = reference.sparse_attention(
        case.q[last], case.kv, selection[last], out_compressed[last], case.gate_logits[last],
        batch, nsa=case.nsa,
    )  # fmt: skip
    name = f"selected + window + gates, {keep:.0%} local"
    return row(name, run, floor, must_agree(name, run()[last], expected))


def decode_rows(
    shape: AttentionShape, nsa: NSAShape, num_rows: int, context_len: int, ceilings: Ceilings
) -> Iterator[Row]:
    """One decode step of a layer, whole and by op: the mean of a CUDA graph's layers."""
    layers = [
        make_case(
            shape, nsa, num_rows=num_rows, context_len=context_len, query_len=1, device="cuda",
            dtype=torch.bfloat16,
        )
        for _ in range(_num_layers(shape, nsa, num_rows, context_len))
    ]  # fmt: skip
    case = layers[0]
    for name, timing in rival_decode(case):
        yield Row("decode", name, num_rows, context_len, timing)
    floors = cost.decode(shape, nsa, num_rows, context_len)
    compressor = Compressor()

    def write(case: Case) -> None:
        gpu.kv_write(
            case.k, case.v, case.kv, case.compressed, case.batch, nsa=nsa, compressor=compressor
        )

    def compressed(case: Case) -> tuple[Tensor, Tensor]:
        out, selection = gpu.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
        assert out is not None
        return out, selection

    def sparse(case: Case, out: Tensor, selection: Tensor) -> Tensor:
        return gpu.sparse_attention(
            case.q, case.kv, selection, out, case.gate_logits, case.batch, nsa=nsa
        )

    def layer(case: Case) -> Tensor:
        write(case)
        return sparse(case, *compressed(case))

    out, selection = compressed(case)
    expected, _ = reference.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    assert expected is not None
    error = must_agree("compressed_attention", out, expected)
    whole = reference.sparse_attention(
        case.q, case.kv, selection, out, case.gate_logits, case.batch, nsa=nsa
    )
    sparse_error = must_agree("sparse_attention", sparse(case, out, selection), whole)
    for name, run, part, off in (
        ("kv_write", write, "kv_write", None),
        ("compressed + select", compressed, "compressed_attention", error),
        ("selected + window + gates", lambda c: sparse(c, out, selection), "sparse", sparse_error),
        ("layer", layer, "layer", sparse_error),
    ):
        timing = time_graph([partial(run, each) for each in layers])
        floor = floor_ms(floors[part], ceilings)
        yield Row("decode", name, num_rows, context_len, timing, floor, off)


def _num_layers(shape: AttentionShape, nsa: NSAShape, num_rows: int, context_len: int) -> int:
    """Layers of a graph: at least 2, and more until what they read is far beyond the L2 cache."""
    read = cost.decode(shape, nsa, num_rows, context_len)["layer"].bytes
    return max(2, min(16, (256 << 20) // read))
