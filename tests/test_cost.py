"""Bytes and flops of ops against counts made by hand."""

from dataclasses import dataclass

import pytest

from nsa_serve.kernels import cost
from nsa_serve.kernels.shapes import NSAShape

HEADS = cost.Heads(num_q=64, num_kv=4, dim_k=128, dim_v=128)
NSA = NSAShape()


def test_full_attention_over_64k_tokens_is_70_tflop() -> None:
    found = cost.dense_attention(HEADS, [cost.Row(65536, 65536)])
    assert found.flops == 2 * 65536 * 65537 // 2 * 64 * 256
    assert found.flops == pytest.approx(70.4e12, rel=0.01)
    assert found.bytes == 65536 * (64 + 4) * 256 * 2


def test_a_decode_reads_its_window_and_no_more() -> None:
    found = cost.window_attention(HEADS, [cost.Row(65536, 1), cost.Row(100, 1)], NSA)
    assert found.flops == 2 * (512 + 100) * 64 * 256
    assert found.bytes == 2 * 64 * 256 * 2 + 612 * 4 * 256 * 2


@pytest.mark.parametrize(("context", "keys"), [(1, 1), (1024, 1024), (1025, 961), (1088, 1024)])
def test_a_decode_reads_n_blocks_of_which_the_last_is_partial(context: int, keys: int) -> None:
    found = cost.selected_attention(HEADS, [cost.Row(context, 1)], NSA)
    assert found.flops == 2 * keys * 64 * 256
    assert found.bytes == 64 * 256 * 2 + keys * 4 * 256 * 2 + 4 * 16 * 4


def test_nsa_over_64k_tokens_takes_a_seventh_of_full_attention() -> None:
    rows = [cost.Row(65536, 65536)]
    branches = [
        cost.compressed_attention(HEADS, rows, NSA),
        cost.selected_attention(HEADS, rows, NSA),
        cost.window_attention(HEADS, rows, NSA),
    ]
    flops = [branch.flops / 1e12 for branch in branches]
    assert flops == pytest.approx([4.4, 2.2, 1.1], abs=0.1)


def test_scores_that_nobody_needs_cost_nothing() -> None:
    short = cost.compressed_attention(HEADS, [cost.Row(1024, 1024)], NSA, with_output=False)
    assert short.flops == 0
    longer = cost.compressed_attention(HEADS, [cost.Row(1025, 1)], NSA, with_output=False)
    assert longer.flops == 2 * 63 * 64 * 128


@pytest.mark.parametrize(
    ("context", "new", "entries", "older"), [(31, 1, 0, 0), (32, 1, 1, 31), (64, 64, 3, 0)]
)
def test_writes_count_completed_entries(context: int, new: int, entries: int, older: int) -> None:
    found = cost.kv_write(HEADS, [cost.Row(context, new)], NSA)
    assert found.bytes == (2 * new + entries + older) * 4 * 256 * 2
    assert found.flops == entries * 32 * 4 * 256
    dense = cost.kv_write(HEADS, [cost.Row(context, new)], None)
    assert dense == cost.Cost(2 * new * 4 * 256 * 2, 0)


def test_costs_add_up() -> None:
    total = cost.swiglu(2, 10) + cost.add_rms_norm(2, 10) + cost.gated_fusion(HEADS, 1)
    assert total.bytes == 2 * 60 + 2 * 90 + 2 * (4 * 64 * 128 + 192)
    assert total.flops == 40 + 100 + 6 * 64 * 128


def test_a_decode_step_of_32_rows_at_64k_moves_what_memory_takes_86_microseconds_for() -> None:
    floors = cost.decode(Shape(), NSA, 32, 65536)
    assert set(floors) == {"kv_write", "compressed_attention", "sparse", "layer"}
    assert floors["layer"].bytes / 4.28e12 == pytest.approx(86e-6, rel=0.05)
    num_bytes, num_flops = floors["layer"]
    assert num_bytes == sum(floors[op].bytes for op in floors if op != "layer")
    assert num_flops == sum(floors[op].flops for op in floors if op != "layer")


def test_short_contexts_are_read_once_by_both_branches() -> None:
    rows = [cost.Row(300, 1)]
    both = cost.sparse_attention(HEADS, rows, NSA)
    alone = cost.selected_attention(HEADS, rows, NSA)
    assert both.bytes == alone.bytes + 64 * (128 + 3) * 2


@dataclass(frozen=True, slots=True)
class Shape:
    num_q_heads: int = 64
    num_kv_heads: int = 4
    head_dim_k: int = 128
    head_dim_v: int = 128
