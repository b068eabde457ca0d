"""Bytes of a row that no other row of its step changes, on a CPU, whatever the threads."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.reference import sampling
from nsa_serve.kernels.reference.uniform import uniform_sigmoid, uniform_silu
from nsa_serve.kernels.shapes import CompressKind, Compressor, Phi
from tests.paged import step_batch
from tests.strategies import HEADS, SHAPES, make_ragged

# Torch shares out what has this many numbers.
SHARED = 1 << 15


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_rows_alone_are_the_same(op: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    together = op(rows)
    alone = torch.cat([op(row[None].clone()) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("op", [uniform_sigmoid, uniform_silu])
@pytest.mark.parametrize("width", [1, 7, 40])
@pytest.mark.usefixtures("threads")
def test_an_activation_does_not_depend_on_where_a_number_stands(
    op: Callable[[Tensor], Tensor], width: int
) -> None:
    x = 4 * torch.randn(-(-SHARED // width), width)
    together = op(x)
    assert torch.equal(op(x.flatten()[5:]), together.flatten()[5:])
    some = range(0, len(x), 17)
    assert torch.equal(torch.stack([op(x[row]) for row in some]), together[some])


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(uniform_sigmoid, torch.sigmoid), (uniform_silu, torch.nn.functional.silu)],
)
def test_activations_are_torchs_to_a_rounding(
    ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor]
) -> None:
    x = torch.cat([torch.linspace(-60, 60, 5000), torch.tensor([0.0, -1e4, 1e4, -90.0])])
    wanted = torchs(x.double())
    assert ours(x).dtype == torch.float32
    torch.testing.assert_close(ours(x).double(), wanted, rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_rows_of_swiglu_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    for width in (81, 1000):
        rows = (4 * torch.randn(70, 2 * width)).to(dtype)
        assert_rows_alone_are_the_same(lambda x: reference.swiglu(x, uniform=True), rows)


@pytest.mark.usefixtures("threads")
def test_gated_branches_of_a_token_do_not_depend_on_the_others_of_its_step() -> None:
    case = make_ragged(HEADS[1], SHAPES[0], [(300, 40), (150, 1), (90, 30)], 1)
    gate_logits = torch.randn(*case.q.shape[:2], 3).bfloat16()

    def attend(tokens: slice, chunks: list[tuple[int, int, int]]) -> Tensor:
        q, batch = case.q[tokens], replace(step_batch(case.tables, chunks), uniform=True)
        out, selection = reference.compressed_attention(q, case.compressed, batch, nsa=case.nsa)
        fused: Tensor = reference.sparse_attention(
            q, case.kv, selection, out, gate_logits[tokens], batch, nsa=case.nsa
        )
        return fused

    parts = list(case.parts())
    whole = attend(slice(None), [(row, at[0], len(at)) for row, _, at in parts])
    for row, tokens, positions in parts:
        for i, position in enumerate(positions):
            token = slice(tokens.start + i, tokens.start + i + 1)
            assert torch.equal(attend(token, [(row, position, 1)]), whole[token])


@pytest.mark.usefixtures("threads")
def test_products_and_norms_of_a_row_do_not_depend_on_the_others() -> None:
    weight = torch.randn(200, 576)
    for dtype in (torch.float32, torch.bfloat16):
        rows, matrix = torch.randn(70, 576).to(dtype), weight.to(dtype)
        assert_rows_alone_are_the_same(lambda x, w=matrix: reference.linear(x, w), rows)
        assert_rows_alone_are_the_same(
            lambda x, w=matrix: reference.rms_norm(x, w[0], eps=1e-5), rows
        )


@pytest.mark.parametrize("kind", [CompressKind.MEAN, CompressKind.LINEAR, CompressKind.MLP])
@pytest.mark.usefixtures("threads")
def test_an_entry_does_not_depend_on_the_others_of_its_step(kind: CompressKind) -> None:
    heads, length, dim, hidden = 2, 32, 16, 64
    weights = {
        CompressKind.MEAN: {},
        CompressKind.LINEAR: {"weight": torch.randn(heads, length * dim, dim)},
        CompressKind.MLP: {
            "down": torch.randn(heads, length * dim, hidden) / 16,
            "up": torch.randn(heads, hidden, dim),
        },
    }
    phi = Phi(kind, **weights[kind])

    def entries(tokens: Tensor) -> Tensor:
        positions = torch.zeros(len(tokens), dtype=torch.int64)
        compressor = Compressor(k=phi, v=phi)
        return reference.compress(tokens, tokens, first_positions=positions, compressor=compressor)[
            0
        ]

    assert_rows_alone_are_the_same(entries, torch.randn(40, heads, length, dim))


@pytest.mark.usefixtures("threads")
def test_logprobs_of_a_row_do_not_depend_on_the_others() -> None:
    logits = torch.randn(24, SHARED + 9) - 11
    logits[:, 0] = 0  # about half of the whole: the sum's rounding then shows in its logarithm

    def logprobs(rows: Tensor) -> Tensor:
        chosen, _, top, _ = reference.token_logprobs(rows, rows.argmin(-1), top=3)
        return torch.cat([chosen[:, None], top], -1)

    assert_rows_alone_are_the_same(logprobs, logits)


@pytest.mark.usefixtures("threads")
def test_the_mass_that_truncation_weighs_does_not_depend_on_the_other_rows() -> None:
    # So wide a range that even fp64 rounds the sum.
    scaled = -40 * torch.rand(8, SHARED + 9)
    floor = torch.full((1, 1), -39.0)
    assert_rows_alone_are_the_same(
        lambda rows: sampling._mass(rows, floor.expand(len(rows), 1)), scaled
    )
