"""From plans to step tensors: exact numbers, lasting tables, padding, tokens on the device."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.layout import KVLayout
from nsa_serve.request import SamplingParams
from nsa_serve.runner.graphs import GRAPH_SIZES, padded_sizes, reaches
from nsa_serve.runner.inputs import StepBuffers, TokenSpan
from nsa_serve.runner.staging import Staging, StepSizes
from nsa_serve.schedule.plan import RowStart, ScheduledChunk, StepPlan

LAYOUT = KVLayout(1, 1, 4, 4, page=8, entries_per_page=4, dtype=torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def buffers() -> StepBuffers:
    pool = DevicePool(LAYOUT, num_slots=64, num_blocks=64, device="cpu")
    return StepBuffers(pool, max_rows=4, max_tokens=32, max_model_len=40)


def start(row, block_ids=()) -> RowStart:
    return RowStart(row, f"r{row}", SamplingParams(), 0, [], [], list(block_ids))


def chunk(row, first, tokens, *, num=None, blocks=(), samples=True) -> ScheduledChunk:
    num_tokens = len(tokens) if num is None else num
    return ScheduledChunk(row, f"r{row}", first, num_tokens, list(tokens), list(blocks), samples)


def plan_of(chunks, started=()) -> StepPlan:
    return StepPlan(0, [], list(started), list(chunks))


def stage(buffers, plan, *, spans=(), padded_rows=None):
    """(inputs, all arrays) of a plan."""
    buffers.update_tables(plan)
    samples = sum(chunk.samples for chunk in plan.chunks)
    num_logits = samples + sum(span.count for span in spans)
    sizes = StepSizes(plan.num_tokens, len(plan.chunks), num_logits, samples)
    if padded_rows:
        sizes = StepSizes(padded_rows, padded_rows, padded_rows, samples)
    host = buffers.staging.open(sizes)
    for array in host.values():
        array.view(np.uint8)[:] = 0xA5  # what is not written shows
    shape = buffers.fill(host, sizes, plan.chunks, list(spans))
    fields = buffers.staging.send(sizes)
    return buffers.inputs(fields, shape, reach=buffers.max_model_len if padded_rows else None)


def test_a_mixed_step_has_the_tensors_of_its_plan(buffers):
    plan = plan_of(
        [
            chunk(2, 9, [50], blocks=[7]),
            chunk(0, 0, [11, 12, 13], blocks=[3], samples=False),
            chunk(3, 17, [21, 22]),
        ],
        started=[start(2, [5]), start(0), start(3, [8, 1, 9])],
    )
    step = stage(buffers, plan)
    assert step.token_ids.tolist() == [50, 11, 12, 13, 21, 22]
    assert step.batch.positions.tolist() == [9, 0, 1, 2, 17, 18]
    assert step.batch.token_rows.tolist() == [0, 1, 1, 1, 2, 2]
    assert step.batch.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert step.batch.context_lens.tolist() == [10, 3, 19]
    assert step.batch.block_table.tolist() == [[5, 7, -1], [3, -1, -1], [8, 1, 9]]
    assert step.batch.slot_table.tolist() == step.batch.block_table.tolist()
    assert step.logits_index.tolist() == [0, 5]
    assert (step.batch.max_query_len, step.batch.max_context_len) == (3, 19)


def test_tensors_have_the_types_of_the_contract(buffers):
    step = stage(buffers, plan_of([chunk(0, 0, [1], blocks=[2])], started=[start(0)]))
    wide = {step.token_ids.dtype, step.batch.positions.dtype, step.logits_index.dtype}
    narrow = {
        getattr(step.batch, name).dtype
        for name in ("token_rows", "cu_seqlens_q", "context_lens", "block_table", "slot_table")
    }
    assert (wide, narrow) == ({torch.int64}, {torch.int32})


def test_a_missing_token_is_the_last_one_sampled_for_its_row(buffers):
    buffers.last_tokens.copy_(torch.tensor([100, 101, 102, 103]))
    plan = plan_of(
        [chunk(3, 4, [], num=1, blocks=[1]), chunk(1, 6, [8], num=2, blocks=[2])],
        started=[start(3), start(1)],
    )
    assert stage(buffers, plan).token_ids.tolist() == [103, 8, 101]


def test_the_table_has_as_many_columns_as_the_longest_context_needs(buffers):
    stage(buffers, plan_of([chunk(1, 0, range(8), blocks=[4, 6])], started=[start(1)]))
    for position, columns in ((8, 2), (15, 2)):
        step = stage(buffers, plan_of([chunk(1, position, [1])]))
        assert step.batch.block_table.tolist() == [[4, 6]]
        assert step.batch.block_table.shape[1] == columns


def test_a_row_taken_anew_forgets_its_blocks(buffers):
    stage(buffers, plan_of([chunk(1, 0, range(20), blocks=[4, 6, 9])], started=[start(1)]))
    stage(buffers, plan_of([chunk(1, 0, [5], blocks=[3])], started=[start(1)]))
    assert buffers.block_table[1].tolist() == [3, -1, -1, -1, -1]


def test_padding_rows_are_empty_and_read_nothing(buffers):
    plan = plan_of([chunk(2, 9, [50], blocks=[5, 7])], started=[start(2)])
    step = stage(buffers, plan, padded_rows=3)
    assert step.token_ids.tolist() == [50, 0, 0]
    assert step.batch.positions.tolist() == [9, -1, -1]
    assert step.batch.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert step.batch.context_lens.tolist() == [10, 0, 0]
    assert step.batch.token_rows[0] == 0
    assert step.logits_index.tolist() == [0, 1, 2]
    assert step.batch.block_table.shape == (3, 5)
    assert step.batch.block_table[0].tolist() == [5, 7, -1, -1, -1]
    assert step.batch.max_context_len == 40


def test_spans_follow_the_samples_in_the_logits_index(buffers):
    plan = plan_of(
        [chunk(0, 0, [1, 2], blocks=[0]), chunk(1, 3, [4, 5, 6], blocks=[1], samples=False)],
        started=[start(0), start(1)],
    )
    spans = [TokenSpan(0, 0, 1), TokenSpan(1, 1, 2)]
    assert stage(buffers, plan, spans=spans).logits_index.tolist() == [1, 0, 3, 4]


@given(data=st.data())
def test_tables_follow_any_sequence_of_starts_and_growth(data):
    pool = DevicePool(LAYOUT, num_slots=99, num_blocks=99, device="cpu")
    buffers = StepBuffers(pool, max_rows=4, max_tokens=32, max_model_len=40)
    blocks: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        rows = data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
        started, chunks = [], []
        for row in rows:
            if row not in blocks or data.draw(st.booleans()):
                blocks[row] = data.draw(st.lists(st.integers(0, 98), max_size=2))
                started.append(start(row, blocks[row]))
            room = 5 - len(blocks[row])
            new = data.draw(st.lists(st.integers(0, 98), min_size=not blocks[row], max_size=room))
            blocks[row] = blocks[row] + new
            last = data.draw(st.integers(0, 8 * len(blocks[row]) - 1))
            chunks.append(chunk(row, last, [1], blocks=new))
        step = stage(buffers, plan_of(chunks, started))
        columns = max(c.start // 8 for c in chunks) + 1
        expected = [(blocks[row] + [-1] * 5)[:columns] for row in rows]
        assert step.batch.block_table.tolist() == expected


def test_a_chunk_beyond_its_pages_is_our_own_mistake(buffers):
    plan = plan_of([chunk(0, 8, [1], blocks=[2])], started=[start(0)])
    with pytest.raises(AssertionError, match="beyond"):
        stage(buffers, plan)


def test_a_step_staged_next_leaves_the_step_before_as_it_was():
    sizes = StepSizes(2, 1, 1, 1)
    staging = Staging(sizes, CPU)
    staging.open(sizes)["token_ids"][:] = [1, 2]
    first = staging.send(sizes)
    staging.open(sizes)["token_ids"][:] = [3, 4]
    assert first["token_ids"].tolist() == [1, 2]
    assert staging.send(sizes)["token_ids"].tolist() == [3, 4]


@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 9),
    few=st.integers(0, 5),
    more=st.integers(0, 5),
)
def test_offsets_of_the_forward_pass_do_not_depend_on_the_samples(tokens, rows, few, more):
    (a, _), (b, _) = (StepSizes(tokens, rows, rows, n).offsets() for n in (few, few + more))
    assert a[:7] == b[:7]
    assert all(first % 16 == 0 for _, _, first, _ in a)


@given(st.integers(1, 600))
def test_a_graph_size_holds_every_batch_up_to_the_largest(max_rows):
    sizes = padded_sizes(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 20
    assert sizes[-1] == min(max_rows, GRAPH_SIZES[-1])


@given(st.integers(1, 1 << 21))
def test_some_graph_reaches_every_context_and_none_much_farther_than_it_must(max_model_len):
    found = reaches(max_model_len)
    assert list(found) == sorted(set(found))
    assert found[-1] == max_model_len
    assert len(found) <= 6
    assert found[0] < 2 * 2048
    assert all(2 * before <= after < 8 * before for before, after in pairwise(found))
