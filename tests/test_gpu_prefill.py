"""The prefill kernels against the oracle and their reference twins, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_serve.kernels import reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.gpu.compressed_attention import attend_entries, compressed_attention
from nsa_serve.kernels.gpu.dense_attention import dense_attention
from nsa_serve.kernels.gpu.entry_gather import gather_entries
from nsa_serve.kernels.gpu.gated_fusion import gated_fusion, sparse_attention
from nsa_serve.kernels.gpu.score_pass import select_from_entries
from nsa_serve.kernels.gpu.select_blocks import block_scores, select_blocks
from nsa_serve.kernels.gpu.selected_attention import selected_attention
from nsa_serve.kernels.gpu.window_attention import window_attention
from nsa_serve.kernels.shapes import NSAShape
from tests.against_oracle import (
    assert_compressed,
    assert_rows,
    gated_sum_of,
    random_selection,
    selected_of,
    window_of,
)
from tests.kernel_runs import interpreted
from tests.paged import Heads
from tests.strategies import SHAPES, Ragged, make_ragged

pytestmark = interpreted

PACKED = Heads(num_q=6, num_kv=2, dim_k=16, dim_v=8)
CASES = [
    (PACKED, SHAPES[3], torch.float32),
    (Heads(num_q=16, num_kv=1, dim_k=24, dim_v=16), SHAPES[4], torch.float16),
    (Heads(num_q=2, num_kv=2, dim_k=16, dim_v=16), SHAPES[1], torch.float32),
    (Heads(num_q=4, num_kv=1, dim_k=16, dim_v=32), SHAPES[0], torch.float32),
]


def ragged(heads: Heads, nsa: NSAShape, dtype: torch.dtype, seed: int = 0) -> Ragged:
    """A chunk over all borders, a decode, a whole short prompt and one single token; padding."""
    page, l = nsa.page, nsa.compress_len  # noqa: E741
    longest = nsa.dense_len + page
    lengths = [(longest + 1, 18), (longest, 1), (max(9, l), max(9, l)), (1, 1)]
    return make_ragged(heads, nsa, lengths, seed, dtype=dtype, pad_tokens=2, pad_rows=1)


@pytest.mark.parametrize(("heads", "nsa", "dtype"), CASES)
def test_compressed_attention_and_its_selection_are_the_oracles(
    heads: Heads, nsa: NSAShape, dtype: torch.dtype
) -> None:
    case = ragged(heads, nsa, dtype)
    out, selection = compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    assert_compressed(out, selection, case)


@pytest.mark.parametrize(("heads", "nsa", "dtype"), CASES)
def test_one_pass_gives_the_gated_sum_of_the_oracles_branches(
    heads: Heads, nsa: NSAShape, dtype: torch.dtype
) -> None:
    case = ragged(heads, nsa, dtype)
    selection = random_selection(case)
    out_compressed = torch.randn(*case.q.shape[:2], heads.dim_v).to(dtype)
    out_compressed[case.num_real :] = 0
    gates = torch.randn(*case.q.shape[:2], 3).to(dtype)
    out = sparse_attention(case.q, case.kv, selection, out_compressed, gates, case.batch, nsa=nsa)
    assert_rows(out, case, gated_sum_of(case, selection, out_compressed, gates))


def test_window_and_selected_attention_alone_are_the_oracles() -> None:
    case = ragged(*CASES[0])
    selection = random_selection(case)
    out = window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    assert_rows(out, case, window_of(case))
    out = selected_attention(case.q, case.kv, selection, case.batch, nsa=case.nsa)
    assert_rows(out, case, selected_of(case, selection))


def test_selected_pages_are_taken_from_given_slots() -> None:
    case = ragged(*CASES[0])
    selection = random_selection(case)
    rows = case.batch.slot_table[case.batch.token_rows.long()]
    slots = rows.gather(1, selection.long().clamp(min=0).flatten(1)).view_as(selection)
    slots = torch.where(selection >= 0, slots, -1)
    # Pages before a row's chunk live only where ``slots`` says.
    table = case.batch.slot_table.clone()
    table[0, : case.chunks[0][1] // case.nsa.page] = -1
    batch = replace(case.batch, slot_table=table)
    out = selected_attention(case.q, case.kv, selection, batch, nsa=case.nsa, slots=slots)
    assert_rows(out, case, selected_of(case, selection))


def test_entries_read_page_by_page_give_the_bytes_of_gathered_ones() -> None:
    case = ragged(*CASES[0])
    results = []
    for paged in (False, True):
        entries = gather_entries(case.compressed, case.batch, nsa=case.nsa, paged=paged)
        out, lse = attend_entries(case.q, entries, case.batch, nsa=case.nsa, with_output=True)
        selection = select_from_entries(case.q, entries, lse, case.batch, nsa=case.nsa)
        results.append((out, lse, selection))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_smaller_scratch_gives_the_same_selection() -> None:
    case = ragged(*CASES[0])
    entries = gather_entries(case.compressed, case.batch, nsa=case.nsa)
    _, lse = attend_entries(case.q, entries, case.batch, nsa=case.nsa, with_output=False)
    wide, narrow = (
        select_from_entries(case.q, entries, lse, case.batch, nsa=case.nsa, scratch_bytes=size)
        for size in (1 << 20, 1)
    )
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("new", [13, 5, 1])
def test_chunking_a_prompt_does_not_change_a_byte_of_a_uniform_step(new: int) -> None:
    heads, nsa = PACKED, SHAPES[3]
    length = nsa.dense_len + nsa.page + 5
    whole, late = (make_ragged(heads, nsa, [(length, count)], 3) for count in (24, new))
    gates = torch.randn(24, heads.num_q, 3)
    outs = []
    for case in (whole, late):
        batch = replace(case.batch, uniform=True)
        q, tail = whole.q[-case.num_real :], gates[-case.num_real :]
        out, selection = compressed_attention(q, whole.compressed, batch, nsa=nsa)
        fused = sparse_attention(q, whole.kv, selection, out, tail, batch, nsa=nsa)
        dense = dense_attention(q, whole.kv, batch)
        outs.append((out, selection, fused, dense))
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one[-new:], other)


@pytest.mark.parametrize("page", [48, 2048])
def test_entries_per_page_that_tiles_cannot_hold_are_refused_in_words(page: int) -> None:
    nsa = NSAShape(page=page)
    case = make_ragged(PACKED, nsa, [(20, 20)], 0)
    with pytest.raises(ContractError, match=r"power of two, at most 64.*\(P/d\)"):
        compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)


def test_block_scores_spread_entries_as_the_reference_does() -> None:
    for nsa in SHAPES:
        p = torch.rand(3, 6, 21).softmax(-1)
        out = block_scores(p, nsa=nsa, num_kv_heads=2)
        torch.testing.assert_close(out, reference.block_scores(p, nsa=nsa, num_kv_heads=2))


@pytest.mark.parametrize("nsa", SHAPES)
def test_equal_scores_are_selected_from_the_smallest_index_on(nsa: NSAShape) -> None:
    blocks = 40
    scores = torch.randint(0, 4, (24, 2, blocks)).float() / 4
    scores[::3] = torch.rand(8, 2, blocks)
    scores[1, 0, ::2] = -0.0
    positions = torch.randint(0, blocks * nsa.page, (24,))
    out = select_blocks(scores, positions, nsa=nsa)
    assert torch.equal(out, reference.select_blocks(scores, positions, nsa=nsa))


def test_gated_fusion_is_the_reference() -> None:
    branches, gates = torch.randn(3, 7, 6, 24), torch.randn(7, 6, 3)
    torch.testing.assert_close(
        gated_fusion(*branches, gates), reference.gated_fusion(*branches, gates)
    )
