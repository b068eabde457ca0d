"""The attention branches in plain torch against the oracle, on ragged batches in poisoned pools."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.shapes import NSAShape, PagedKV, StepBatch
from tests import oracle
from tests.paged import Heads, fill_entries
from tests.strategies import HEADS, SHAPES, Ragged, RaggedPlan, make_ragged, ragged_plans

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_selection(case: Ragged, seed: int) -> Tensor:
    """Blocks of each token at random, the current one always among them: [T, Hkv, n]."""
    generator = torch.Generator().manual_seed(seed)
    n = case.nsa.num_selected
    selection = torch.full((case.batch.num_tokens, case.heads.num_kv, n), -1, dtype=torch.int32)
    for token, position in enumerate(case.batch.positions.tolist()):
        current = position // case.nsa.page
        for head in range(case.heads.num_kv if position >= 0 else 0):
            others = torch.randperm(current, generator=generator)[: n - 1].tolist()
            blocks = sorted([*others, current])
            selection[token, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return selection


def assert_close(out: Tensor, case: Ragged, expected: list[Tensor]) -> None:
    assert out.dtype == case.q.dtype
    padding = out[case.num_real :]
    assert torch.equal(padding, torch.zeros_like(padding))
    atol = TOLERANCE[case.q.dtype]
    for (_, tokens, _), want in zip(case.parts(), expected, strict=True):
        torch.testing.assert_close(out[tokens].double(), want, atol=atol, rtol=atol)


def dense_of(case: Ragged) -> list[Tensor]:
    return [oracle.dense(case.q[s], case.k[r], case.v[r], at) for r, s, at in case.parts()]


def window_of(case: Ragged) -> list[Tensor]:
    w = case.nsa.window
    return [oracle.window(case.q[s], case.k[r], case.v[r], at, w=w) for r, s, at in case.parts()]


def selected_of(case: Ragged, selection: Tensor) -> list[Tensor]:
    chosen, page = selection.tolist(), case.nsa.page
    return [
        oracle.selected(case.q[s], case.k[r], case.v[r], at, chosen[s], page=page)
        for r, s, at in case.parts()
    ]


@settings(max_examples=25)
@given(ragged_plans())
def test_dense_attention_is_causal_attention_over_each_row(plan: RaggedPlan) -> None:
    case = plan.build()
    assert_close(reference.dense_attention(case.q, case.kv, case.batch), case, dense_of(case))


@settings(max_examples=25)
@given(ragged_plans())
def test_window_attention_sees_exactly_the_last_w_tokens(plan: RaggedPlan) -> None:
    case = plan.build()
    out = reference.window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    assert_close(out, case, window_of(case))


@settings(max_examples=25)
@given(ragged_plans(), st.integers(0, 1000))
def test_selected_attention_sees_exactly_the_selected_blocks(plan: RaggedPlan, seed: int) -> None:
    case = plan.build()
    selection = random_selection(case, seed)
    out = reference.selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_close(out, case, selected_of(case, selection))


@settings(max_examples=15)
@given(ragged_plans(), st.integers(0, 1000))
def test_selected_attention_takes_pages_from_given_slots(plan: RaggedPlan, seed: int) -> None:
    case = plan.build()
    selection = random_selection(case, seed)
    slots = torch.full_like(selection, -1)
    for row, tokens, _ in case.parts():
        found = case.batch.slot_table[row][selection[tokens].clamp(min=0).long()]
        slots[tokens] = found.where(selection[tokens] >= 0, -1)
    nowhere = replace(case.batch, slot_table=torch.full_like(case.batch.slot_table, -1))
    out = reference.selected_attention(
        case.q, case.kv, selection, nowhere, nsa=case.nsa, slots=slots
    )
    assert_close(out, case, selected_of(case, selection))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[(130, 1), (65, 1)], [(200, 30), (64, 64), (9, 2)]])
def test_branches_keep_16_bit_types_and_compute_in_fp32(
    dtype: torch.dtype, lengths: list[tuple[int, int]]
) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], lengths, 3, dtype=dtype, pad_tokens=2, pad_rows=1)
    selection = random_selection(case, 5)
    out = reference.selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_close(out, case, selected_of(case, selection))
    out = reference.window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    assert_close(out, case, window_of(case))
    assert_close(reference.dense_attention(case.q, case.kv, case.batch), case, dense_of(case))


@pytest.mark.parametrize("lengths", [[(1, 1)], [(63, 63)], [(64, 64)], [(65, 65)], [(192, 100)]])
def test_one_row_alone_gives_what_it_gives_in_a_batch(lengths: list[tuple[int, int]]) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], lengths, 11)
    selection = random_selection(case, 7)
    out = reference.selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_close(out, case, selected_of(case, selection))
    out = reference.window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    assert_close(out, case, window_of(case))


@pytest.mark.parametrize("heads", HEADS)
def test_long_chunks_attend_tile_by_tile(heads: Heads) -> None:
    case = make_ragged(heads, SHAPES[0], [(520, 150)], 2)
    selection = random_selection(case, 2)
    out = reference.selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_close(out, case, selected_of(case, selection))
    out = reference.window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    assert_close(out, case, window_of(case))
    assert_close(reference.dense_attention(case.q, case.kv, case.batch), case, dense_of(case))


def test_a_batch_of_padding_alone_gives_zeros_and_no_selection() -> None:
    case = make_ragged(HEADS[0], SHAPES[0], [(70, 2)], 1, pad_tokens=2, pad_rows=1)
    padding = replace(
        case.batch,
        positions=torch.full((4,), -1),
        token_rows=torch.zeros(4, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32),
        context_lens=torch.zeros(2, dtype=torch.int32),
        block_table=torch.full((2, 3), -1, dtype=torch.int32),
        slot_table=torch.full((2, 3), -1, dtype=torch.int32),
        max_query_len=2,
        max_context_len=192,
    )
    q, nsa = case.q, NSAShape(num_selected=3, window=64)
    out, selection = reference.compressed_attention(q, case.compressed, padding, nsa=nsa)
    assert out is not None
    assert (selection == -1).all()
    selected = reference.selected_attention(q, case.kv, selection, padding, nsa=nsa)
    window = reference.window_attention(q, case.kv, padding, nsa=nsa)
    dense = reference.dense_attention(q, case.kv, padding)
    for branch in (out, selected, window, dense):
        assert torch.equal(branch, torch.zeros_like(branch))


def test_fused_branches_are_the_gated_sum_of_the_oracle() -> None:
    nsa = SHAPES[0]
    lengths = [(300, 3), (200, 60), (17, 17), (31, 1)]
    case = make_ragged(HEADS[1], nsa, lengths, 4, pad_tokens=2)
    sizes = {"l": nsa.compress_len, "d": nsa.compress_stride}
    entries = (
        [oracle.entries(k, "mean", **sizes) for k in case.k],
        [oracle.entries(v, "mean", **sizes) for v in case.v],
    )
    case = with_entries(case, *entries)
    gates = torch.randn(case.batch.num_tokens, case.heads.num_q, 3)
    expected = [
        oracle.nsa(
            case.q[s], case.k[r], case.v[r], at, gates[s],
            page=nsa.page, n=nsa.num_selected, w=nsa.window, **sizes,
        )
        for r, s, at in case.parts()
    ]  # fmt: skip
    out, selection = reference.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    fused = reference.sparse_attention(case.q, case.kv, selection, out, gates, case.batch, nsa=nsa)
    assert_close(fused, case, expected)
    alone = reference.sparse_attention(case.q, case.kv, selection, None, None, case.batch, nsa=nsa)
    assert_close(alone, case, selected_of(case, selection))


def with_entries(case: Ragged, k: list[Tensor], v: list[Tensor]) -> Ragged:
    for row, (keys, values) in enumerate(zip(k, v, strict=True)):
        fill_entries(case.compressed, case.tables, row, keys, values)
    return case


def test_pools_of_pages_apart_in_memory_are_read_as_well() -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(200, 40), (130, 1)], 9)
    apart = PagedKV(
        case.kv.k.transpose(1, 2).contiguous().transpose(1, 2),
        case.kv.v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    expected = reference.dense_attention(case.q, case.kv, case.batch)
    assert torch.equal(reference.dense_attention(case.q, apart, case.batch), expected)


def test_wrong_shapes_are_refused_with_both_shapes_named() -> None:
    case = make_ragged(HEADS[0], SHAPES[0], [(70, 2)], 1)
    with pytest.raises(ContractError, match=r"q=\[2, 2, 12\] float32"):
        reference.dense_attention(case.q[..., :12], case.kv, case.batch)
    wrong = torch.zeros(2, 2, 9, dtype=torch.int32)
    with pytest.raises(ContractError, match="selection is not"):
        reference.selected_attention(case.q, case.kv, wrong, case.batch, nsa=case.nsa)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_may_choose_any_blocks_and_unequally_many(heads: Heads) -> None:
    case = make_ragged(heads, SHAPES[0], [(130, 2), (40, 1), (200, 3)], 4)
    selection = random_selection(case, 4)
    # The first head without its current block, the last with no block but its first.
    current = (case.batch.positions // case.nsa.page)[:, None]
    kept = selection[:, 0].masked_fill(selection[:, 0] == current, -1)
    selection[:, 0] = kept.where(kept >= 0, case.nsa.num_selected + 1000).sort(-1).values
    selection[:, 0].masked_fill_(selection[:, 0] > 1000, -1)
    selection[:, -1, 1:] = -1
    out = reference.selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_close(out, case, selected_of(case, selection))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_tokens_bytes_do_not_depend_on_the_other_tokens_of_its_step(
    dtype: torch.dtype,
) -> None:
    case = make_ragged(HEADS[0], SHAPES[0], [(130, 1), (40, 1), (131, 1), (9, 1)], 5, dtype=dtype)
    selection, batch, nsa = random_selection(case, 5), case.batch, case.nsa

    def branches(q: Tensor, chosen: Tensor, step: StepBatch) -> Tensor:
        selected = reference.selected_attention(q, case.kv, chosen, step, nsa=nsa)
        window = reference.window_attention(q, case.kv, step, nsa=nsa)
        return torch.cat([selected, window, reference.dense_attention(q, case.kv, step)], -1)

    together = branches(case.q, selection, batch)
    for row in range(batch.num_rows):
        own = slice(row, row + 1)
        alone = replace(
            batch,
            positions=batch.positions[own],
            token_rows=torch.zeros(1, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=batch.context_lens[own],
            block_table=batch.block_table[own],
            slot_table=batch.slot_table[own],
            max_context_len=int(batch.context_lens[row]),
        )
        assert torch.equal(branches(case.q[own], selection[own], alone), together[own])


def test_a_step_remembers_what_it_found_and_another_step_does_not() -> None:
    batch = make_ragged(HEADS[0], SHAPES[0], [(5, 1)], 6).batch
    assert batch.once("answer", lambda: 1) == 1
    assert batch.once("answer", lambda: 2) == 1
    assert replace(batch, max_context_len=64).once("answer", lambda: 2) == 2
