"""Compressed attention, block scores and the choice of blocks against the oracle."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.reference.select_blocks import select_for_one, spread_over_blocks
from nsa_serve.kernels.shapes import NSAShape
from tests import oracle
from tests.strategies import HEADS, SHAPES, Ragged, RaggedPlan, make_ragged, ragged_plans

room = sys.modules["nsa_serve.kernels.reference.compressed_attention"]


def sizes(nsa: NSAShape) -> dict[str, int]:
    return {"l": nsa.compress_len, "d": nsa.compress_stride}


def choice(nsa: NSAShape) -> dict[str, int]:
    return {
        "page": nsa.page,
        "n": nsa.num_selected,
        "initial": nsa.num_initial,
        "local": nsa.num_local,
    }


def assert_compressed(case: Ragged, out: Tensor | None, selection: Tensor, atol: float) -> None:
    """Outputs are the oracle's; so are selections, but for choices between near ties."""
    nsa, chosen = case.nsa, selection.tolist()
    assert (selection[case.num_real :] == -1).all()
    if out is not None:
        assert out.dtype == case.q.dtype
        assert not out[case.num_real :].any()
    for request, tokens, positions in case.parts():
        keys, values = case.entries_k[request], case.entries_v[request]
        want, shares = oracle.compressed(case.q[tokens], keys, values, positions, **sizes(nsa))
        if out is not None:
            torch.testing.assert_close(out[tokens].double(), want, atol=atol, rtol=atol)
            before = sum(t + 1 < nsa.compress_len for t in positions)
            assert not out[tokens][:before].any()
        for t, share, heads in zip(positions, shares, chosen[tokens], strict=True):
            scores = oracle.scores(
                share, t, num_kv_heads=case.heads.num_kv, page=nsa.page, **sizes(nsa)
            )
            for score, blocks in zip(scores, heads, strict=True):
                oracle.check_selection(blocks, score, t, tolerance=1e-5, **choice(nsa))


@settings(max_examples=30)
@given(ragged_plans(), st.booleans())
def test_compressed_attention_and_its_selection_are_the_papers(
    plan: RaggedPlan, with_output: bool
) -> None:
    case = plan.build()
    out, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa, with_output=with_output
    )
    assert (out is not None) is with_output
    assert_compressed(case, out, selection, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bit_keys_are_fp32(dtype: torch.dtype) -> None:
    lengths = [(700, 20), (333, 1), (65, 2)]
    case = make_ragged(HEADS[1], SHAPES[1], lengths, 3, dtype=dtype, pad_tokens=2)
    out, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa
    )
    assert_compressed(case, out, selection, 1e-2)


@pytest.mark.parametrize("budget", [1, 500])
def test_small_passes_give_what_one_pass_gives(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(500, 60), (400, 3), (20, 20)], 5)
    monkeypatch.setattr(room, "_SCORE_BUDGET", budget)
    out, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa
    )
    assert_compressed(case, out, selection, 2e-5)


@pytest.mark.parametrize("length", [31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81])
def test_entries_become_visible_with_their_last_token(length: int) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(length, length)], length)
    out, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa
    )
    assert_compressed(case, out, selection, 2e-5)


def test_scores_are_not_computed_where_every_block_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(256, 200), (100, 1)], 5)
    monkeypatch.delattr(room, "spread_over_blocks")
    monkeypatch.delattr(room, "gather_pages")
    _, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa, with_output=False
    )
    assert_compressed(case, None, selection, 0.0)


@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("budget", [1, 1 << 19])
@pytest.mark.parametrize(
    "lengths", [[(500, 3), (400, 1), (20, 2)], [(1000, 1)], [(290, 1)], [(200, 1), (31, 2)]]
)
def test_ranked_blocks_are_a_wider_selection_by_the_same_scores(
    lengths: list[tuple[int, int]],
    budget: int,
    with_output: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], lengths, 5, pad_tokens=len(lengths) - 1)
    passes: list[Tensor] = []

    def counted(mass: Tensor, nsa: NSAShape) -> Tensor:
        passes.append(mass)
        return spread_over_blocks(mass, nsa)

    def select(nsa: NSAShape, ranked: Tensor | None = None) -> tuple[Tensor, int]:
        passes.clear()
        _, selection = reference.compressed_attention(
            case.q, case.compressed, case.batch, nsa=nsa, with_output=with_output, ranked=ranked
        )
        return selection, len(passes)

    monkeypatch.setattr(room, "_SCORE_BUDGET", budget)
    monkeypatch.setattr(room, "spread_over_blocks", counted)
    wide = replace(case.nsa, num_selected=case.nsa.num_selected + 3)
    ranked = torch.full((case.batch.num_tokens, case.heads.num_kv, wide.num_selected), 7).int()
    alone, num_alone = select(case.nsa)
    beside, num_beside = select(case.nsa, ranked)
    assert torch.equal(alone, beside)
    assert num_alone == num_beside
    assert torch.equal(ranked, select(wide)[0])


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([(2, 2), (6, 2), (4, 1), (16, 1)]),
    st.integers(0, 60),
    st.integers(0, 1000),
)
def test_block_scores_weigh_entries_by_overlap(
    nsa: NSAShape, heads: tuple[int, int], entries: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(2, heads[0], entries, generator=generator)
    scores = reference.block_scores(p, nsa=nsa, num_kv_heads=heads[1])
    last = entries * nsa.compress_stride + nsa.compress_len - 2  # sees no further entry
    for row in range(2):
        want = oracle.scores(p[row], last, num_kv_heads=heads[1], page=nsa.page, **sizes(nsa))
        assert scores.shape[2] == want.shape[1]
        torch.testing.assert_close(scores[row].double(), want, atol=1e-5, rtol=1e-5)


def test_inner_blocks_weigh_1_2_2_2_1_at_32_16_64() -> None:
    p = torch.eye(12)[:, None]  # each row looks at one entry
    scores = reference.block_scores(p, nsa=NSAShape(), num_kv_heads=1)
    assert scores[:, 0, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]


@settings(max_examples=100)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 40),
    st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_selection_is_forced_then_by_score_then_by_index(
    nsa: NSAShape, blocks: int, places: list[int], distinct: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct scores, so that most are ties.
    scores = torch.randint(-1, distinct, (len(places), 2, blocks), generator=generator) / 7
    positions = torch.tensor([place % (blocks * nsa.page) for place in places])
    selection = reference.select_blocks(scores, positions, nsa=nsa)
    assert selection.dtype == torch.int32
    for row, t in enumerate(positions.tolist()):
        for head in range(2):
            want = oracle.select(scores[row, head, : t // nsa.page + 1], t, **choice(nsa))
            padded = want + [-1] * (nsa.num_selected - len(want))
            assert selection[row, head].tolist() == padded


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(-1, 2500), st.integers(1, 6), st.integers(0, 1000))
def test_one_token_alone_selects_as_many_do(
    nsa: NSAShape, position: int, distinct: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = position // nsa.page + 2
    scores = torch.randint(-1, distinct, (1, 2, blocks), generator=generator) / 7
    want = reference.select_blocks(scores, torch.tensor([position]), nsa=nsa)
    assert torch.equal(select_for_one(scores[0], position, nsa), want[0])


@pytest.mark.parametrize("length", [1, 31, 32, 200, 256, 257, 300, 1000])
def test_a_step_of_one_token_is_the_papers_too(length: int) -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(length, 1)], length)
    out, selection = reference.compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa
    )
    assert_compressed(case, out, selection, 2e-5)


def test_minus_zero_ties_with_zero() -> None:
    scores = torch.tensor([[[0.0, -0.0, -0.0, 0.0, 0.0, 0.0, 0.0]]])
    nsa = NSAShape(num_selected=5)
    selection = reference.select_blocks(scores, torch.tensor([6 * 64]), nsa=nsa)
    assert selection.tolist() == [[[0, 1, 2, 5, 6]]]


def test_huge_scores_do_not_push_out_forced_blocks() -> None:
    scores = torch.full((1, 1, 30), 3e38)
    selection = reference.select_blocks(scores, torch.tensor([29 * 64 + 5]), nsa=NSAShape())
    assert selection.tolist() == [[[*range(14), 28, 29]]]


def test_padding_selects_nothing() -> None:
    scores = torch.rand(2, 3, 8)
    selection = reference.select_blocks(scores, torch.tensor([-1, 64]), nsa=NSAShape())
    assert (selection[0] == -1).all()
    assert selection[1].tolist() == [[0, 1] + [-1] * 14] * 3


def test_blocks_after_the_token_are_no_candidates() -> None:
    scores = torch.arange(10.0).view(1, 1, 10)
    selection = reference.select_blocks(scores, torch.tensor([3 * 64 - 1]), nsa=NSAShape())
    assert selection.tolist() == [[[0, 1, 2] + [-1] * 13]]


def test_scores_that_are_not_fp32_are_refused() -> None:
    with pytest.raises(ContractError, match=r"scores=\[1, 1, 4\] bfloat16"):
        reference.select_blocks(torch.rand(1, 1, 4).bfloat16(), torch.tensor([64]), nsa=NSAShape())
