"""What holds of NSA whatever the numbers: limits where a branch is dense, causality, chunking."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch
from tests.paged import Heads, chunks_of, make_tables, poisoned_cache, step_batch
from tests.strategies import HEADS, SHAPES, RaggedPlan, make_ragged, ragged_plans

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def all_branches(
    q: Tensor, kv: PagedKV, compressed: CompressedKV, batch: StepBatch, nsa: NSAShape
) -> dict[str, Tensor]:
    """Every branch's output for queries ``q``, and the selection it was made with."""
    out, selection = reference.compressed_attention(q, compressed, batch, nsa=nsa)
    assert out is not None
    return {
        "compressed": out,
        "selection": selection,
        "selected": reference.selected_attention(q, kv, selection, batch, nsa=nsa),
        "window": reference.window_attention(q, kv, batch, nsa=nsa),
        "dense": reference.dense_attention(q, kv, batch),
    }


@pytest.mark.parametrize("length", [63, 64, 65, 191, 255, 256])
@pytest.mark.parametrize("new", [1, 5, 60])
def test_the_selected_branch_is_dense_up_to_n_pages(length: int, new: int) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(length, new), (100, 1)], length)
    found = all_branches(case.q, case.kv, case.compressed, case.batch, case.nsa)
    torch.testing.assert_close(found["selected"], found["dense"], **CLOSE)


def test_a_longer_context_is_sparse() -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(257 + 64, 1)], 1)
    found = all_branches(case.q, case.kv, case.compressed, case.batch, case.nsa)
    assert (found["selected"] - found["dense"]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 95, 96])
def test_the_window_is_dense_up_to_w_tokens_and_not_beyond(length: int) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(length, length)], length)
    window = reference.window_attention(case.q, case.kv, case.batch, nsa=case.nsa)
    dense = reference.dense_attention(case.q, case.kv, case.batch)
    torch.testing.assert_close(window, dense, **CLOSE)
    longer = make_ragged(HEADS[1], SHAPES[0], [(97, 97)], length)
    window = reference.window_attention(longer.q, longer.kv, longer.batch, nsa=case.nsa)
    dense = reference.dense_attention(longer.q, longer.kv, longer.batch)
    torch.testing.assert_close(window[:96], dense[:96], **CLOSE)
    assert (window[96] - dense[96]).abs().max() > 1e-4


@settings(max_examples=15)
@given(ragged_plans(longest=31, most_new=31))
def test_the_compressed_branch_is_zero_below_l_tokens(plan: RaggedPlan) -> None:
    case = replace(plan, nsa=SHAPES[0]).build()
    out, _ = reference.compressed_attention(case.q, case.compressed, case.batch, nsa=case.nsa)
    assert out is not None
    assert torch.equal(out, torch.zeros_like(out))


def run_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[tuple[int, int]], heads: Heads, nsa: NSAShape
) -> dict[str, Tensor]:
    """Every branch for one request, written and attended chunk by chunk, from an empty cache."""
    tables = make_tables([len(q)], nsa, 1)
    kv, compressed = poisoned_cache(tables, heads)
    found = []
    for start, count in chunks:
        batch, tokens = step_batch(tables, [(0, start, count)]), slice(start, start + count)
        reference.kv_write(
            k[tokens], v[tokens], kv, compressed, batch, nsa=nsa, compressor=Compressor()
        )
        found.append(all_branches(q[tokens], kv, compressed, batch, nsa))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@settings(max_examples=15)
@given(
    st.sampled_from([15, 16, 17, 31, 33, 64, 65, 95, 97, 127, 129, 193, 257, 300]),
    st.lists(st.integers(1, 120), min_size=1, max_size=4),
    st.sampled_from(HEADS),
)
def test_chunks_of_a_prompt_give_what_the_whole_gives(
    length: int, sizes: list[int], heads: Heads
) -> None:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(length, heads.num_q, heads.dim_k, generator=generator)
    k = torch.randn(length, heads.num_kv, heads.dim_k, generator=generator)
    v = torch.randn(length, heads.num_kv, heads.dim_v, generator=generator)
    nsa = SHAPES[0]
    whole = run_in_chunks(q, k, v, [(0, length)], heads, nsa)
    parts = run_in_chunks(q, k, v, chunks_of(length, [*sizes, 30]), heads, nsa)
    same = (whole["selection"] == parts["selection"]).all(-1).all(-1)
    assert same.float().mean() > 0.98  # near ties may fall either way
    for name in ("compressed", "selected", "window", "dense"):
        torch.testing.assert_close(whole[name][same], parts[name][same], **CLOSE)


@pytest.mark.parametrize("new", [1, 40])
def test_the_future_does_not_leak_into_any_branch(new: int) -> None:
    """Later tokens of the same block, and later entries, are changed; nothing else changes."""
    nsa, heads, length = SHAPES[0], HEADS[1], 430
    case = make_ragged(heads, nsa, [(length, length)], 3)
    early = step_batch(case.tables, [(0, 300, new)])
    q = case.q[300 : 300 + new]
    before = all_branches(q, case.kv, case.compressed, early, nsa)
    last = 300 + new - 1
    slots = case.tables.slot_table[0]
    case.kv.k[int(slots[last // 64]), :, last % 64 + 1 :] = torch.nan
    case.kv.v[int(slots[last // 64]), :, last % 64 + 1 :] = torch.nan
    for entry in range(nsa.num_visible(last), nsa.num_visible(length - 1)):
        page, slot = nsa.entry_slot(entry)
        case.compressed.k[int(case.tables.block_table[0, page]), :, slot] = torch.nan
        case.compressed.v[int(case.tables.block_table[0, page]), :, slot] = torch.nan
    after = all_branches(q, case.kv, case.compressed, early, nsa)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@settings(max_examples=10)
@given(ragged_plans(longest=200), st.integers(1, 500))
def test_loose_bounds_on_lengths_change_nothing(plan: RaggedPlan, slack: int) -> None:
    case = plan.build()
    loose = replace(case.batch, max_context_len=case.batch.max_context_len + slack)
    tight = all_branches(case.q, case.kv, case.compressed, case.batch, case.nsa)
    found = all_branches(case.q, case.kv, case.compressed, loose, case.nsa)
    same = (tight["selection"] == found["selection"]).all(-1).all(-1)
    assert same.float().mean() > 0.9  # near ties may fall either way
    for name in ("compressed", "selected", "window", "dense"):
        torch.testing.assert_close(found[name][same], tight[name][same], **CLOSE)


@settings(max_examples=10)
@given(ragged_plans())
def test_a_row_does_not_depend_on_the_others_of_its_batch(plan: RaggedPlan) -> None:
    case = plan.build()
    together = all_branches(case.q, case.kv, case.compressed, case.batch, case.nsa)
    for request, tokens, positions in case.parts():
        batch = step_batch(case.tables, [(request, positions[0], len(positions))])
        alone = all_branches(case.q[tokens], case.kv, case.compressed, batch, case.nsa)
        same = (together["selection"][tokens] == alone["selection"]).all(-1).all(-1)
        assert same.float().mean() > 0.9  # near ties may fall either way
        for name in ("compressed", "selected", "window", "dense"):
            torch.testing.assert_close(together[name][tokens][same], alone[name][same], **CLOSE)


def test_pages_beyond_two_to_the_31_elements_are_found() -> None:
    """Memory that is never touched costs nothing: the pool is 4 GiB of addresses, 3 pages used."""
    slots = 2**19 + 4
    pool = torch.empty(slots, 1, 64, 64, dtype=torch.bfloat16)
    kv, table = PagedKV(pool, pool), torch.tensor([[slots - 1, slots - 2, 1]], dtype=torch.int32)
    k = torch.randn(130, 1, 64).bfloat16()
    batch = StepBatch(
        positions=torch.arange(130),
        token_rows=torch.zeros(130, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 130], dtype=torch.int32),
        context_lens=torch.tensor([130], dtype=torch.int32),
        block_table=table,
        slot_table=table,
        max_query_len=130,
        max_context_len=130,
    )
    reference.kv_write(k, k, kv, None, batch, nsa=NSAShape(), compressor=Compressor())
    out = reference.window_attention(k, kv, batch, nsa=NSAShape())
    keys = k.float().transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(keys, keys, keys, is_causal=True)
    torch.testing.assert_close(out.float(), want.transpose(0, 1), atol=2e-2, rtol=2e-2)
