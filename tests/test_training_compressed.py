"""The compressed branch in training: φ, attention over entries, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.kernels import dispatch, gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.gpu.compressed_training import compressed_backward, compressed_with_lse
from nsa_serve.kernels.gpu.tuning import Tile
from nsa_serve.kernels.shapes import CompressKind, Compressor, NSAShape, Phi
from nsa_serve.kernels.training.compressed import (
    block_importance,
    compress_packed,
    compressed_branch,
)
from nsa_serve.kernels.training.packed import PackedBatch
from tests import oracle
from tests.kernel_runs import interpreted, poisoned_memory
from tests.paged import Heads
from tests.strategies import SHAPES

pytestmark = interpreted

SMALL = NSAShape(8, 4, 16, num_selected=4, window=24)
TOLERANCE = {torch.float32: 3e-5, torch.float16: 8e-3, torch.float64: 1e-9}
BACKENDS = [pytest.param("reference", id="torch"), pytest.param("gpu", id="triton")]


@dataclass(frozen=True, slots=True)
class Case:
    """Random operands of packed sequences; slots that are no entries are full of NaN."""

    nsa: NSAShape
    batch: PackedBatch
    q: Tensor
    k_entries: Tensor
    v_entries: Tensor
    d_out: Tensor

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Tokens and entries of each sequence."""
        lead, d = self.nsa.overlap - 1, self.nsa.compress_stride
        for start, stop in pairwise(self.batch.cu_seqlens.tolist()):
            yield slice(start, stop), slice(start // d + lead, stop // d)


def make_case(
    heads: Heads, nsa: NSAShape, lens: list[int], dtype: torch.dtype = torch.float32
) -> Case:
    batch = PackedBatch.build(lens, nsa=nsa, device="cpu")
    generator = torch.Generator().manual_seed(len(lens))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slots = batch.num_tokens // nsa.compress_stride
    case = Case(
        nsa,
        batch,
        normal(batch.num_tokens, heads.num_q, heads.dim_k),
        normal(slots, heads.num_kv, heads.dim_k),
        normal(slots, heads.num_kv, heads.dim_v),
        normal(batch.num_tokens, heads.num_q, heads.dim_v),
    )
    free = torch.ones(slots, dtype=torch.bool)
    for _, entries in case.parts():
        free[entries] = False
    case.k_entries[free], case.v_entries[free] = torch.nan, torch.nan
    return case


def run(case: Case, backend: str) -> list[Tensor]:
    """Output, selection, dq, dk, dv."""
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k_entries, case.v_entries)]
    with dispatch.use(backend), poisoned_memory():
        out, selection = compressed_branch(*leaves, case.batch, nsa=case.nsa)
        assert not selection.requires_grad
        out.backward(case.d_out)
    return [out.detach(), selection, *(leaf.grad for leaf in leaves)]


def wanted(case: Case) -> list[Tensor]:
    """The oracle's output, and its gradients by autograd, in fp64; 0 at slots without an entry."""
    leaves = [x.double().requires_grad_() for x in (case.q, case.k_entries, case.v_entries)]
    q, k, v = leaves
    sizes = {"l": case.nsa.compress_len, "d": case.nsa.compress_stride}
    outs = [
        oracle.compressed(q[s], k[e], v[e], list(range(s.stop - s.start)), **sizes)[0]
        for s, e in case.parts()
    ]
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.d_out.double())]


def assert_close(found: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative to the largest number: gradients of few queries are tiny beside others."""
    atol = tolerance * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(found.double(), want.double(), atol=atol, rtol=tolerance)


G1 = Heads(num_q=2, num_kv=2, dim_k=16, dim_v=16)
G3 = Heads(num_q=6, num_kv=2, dim_k=16, dim_v=8)
LONE = Heads(num_q=3, num_kv=1, dim_k=16, dim_v=8)
G16 = Heads(num_q=16, num_kv=1, dim_k=8, dim_v=16)
# Whole pages at and beside the length from which selections are sparse; one page; neighbours.
LENS = [16, 48, 80]
CASES = [
    (G1, SMALL, [48, 64], torch.float32),
    (G3, SMALL, LENS, torch.float32),
    (G16, SMALL, [80, 16], torch.float32),
    (LONE, SMALL, [80, 16], torch.float16),
    (G16, SHAPES[1], [16, 48], torch.float16),  # entries side by side, l = P
    (LONE, SHAPES[0], [64, 128], torch.float32),  # the paper's sizes
    (G1, SHAPES[4], [80, 16], torch.float32),  # l = 4·d
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "nsa", "lens", "dtype"), CASES)
def test_output_and_gradients_are_the_oracles(
    heads: Heads, nsa: NSAShape, lens: list[int], dtype: torch.dtype, backend: str
) -> None:
    case = make_case(heads, nsa, lens, dtype)
    out, _, *gradients = run(case, backend)
    for found, want in zip([out, *gradients], wanted(case), strict=True):
        assert found.dtype == dtype
        assert_close(found, want, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_is_the_oracles(backend: str) -> None:
    case = make_case(G3, SMALL, [16, 80])
    selection = run(case, backend)[1]
    nsa = case.nsa
    lengths = {"l": nsa.compress_len, "d": nsa.compress_stride}
    for tokens, entries in case.parts():
        at = list(range(tokens.stop - tokens.start))
        operands = (case.q[tokens], case.k_entries[entries], case.v_entries[entries])
        _, shares = oracle.compressed(*operands, at, **lengths)
        for chosen, share, t in zip(selection[tokens].tolist(), shares, at, strict=True):
            score = oracle.scores(share, t, num_kv_heads=2, page=nsa.page, **lengths)
            for head, blocks in enumerate(chosen):
                oracle.check_selection(
                    blocks, score[head], t, page=nsa.page, n=nsa.num_selected,
                    initial=nsa.num_initial, local=nsa.num_local, tolerance=1e-4,
                )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_an_entry_give_zero_and_take_no_gradient(backend: str) -> None:
    case = make_case(G3, SMALL, [16, 16])
    out, _, dq, dk, dv = run(case, backend)
    for tokens, entries in case.parts():
        unseen = slice(tokens.start, tokens.start + case.nsa.compress_len - 1)
        assert torch.equal(out[unseen], torch.zeros_like(out[unseen]))
        assert torch.equal(dq[unseen], torch.zeros_like(dq[unseen]))
        first = slice(tokens.start // case.nsa.compress_stride, entries.start)
        assert torch.equal(dk[first], torch.zeros_like(dk[first]))
        assert torch.equal(dv[first], torch.zeros_like(dv[first]))


@pytest.mark.parametrize(
    "tiles",
    [
        (Tile(5, 16, 16, 4, 2), Tile(8, 32, 16, 4, 2)),
        (Tile(4, 16, 32, 4, 1), Tile(64, 256, 64, 4, 1)),  # tokens beyond a page
        (Tile(21, 64, 16, 4, 2), Tile(4, 16, 32, 4, 2)),
    ],
)
def test_gradients_do_not_depend_on_tiles_and_ranges(
    tiles: tuple[Tile, Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_serve.kernels.gpu.entry_backward.MIN_RANGE", 16)
    case = make_case(LONE, SMALL, [16, 48])
    operands = (case.q, case.k_entries, case.v_entries)
    with poisoned_memory():
        out, lse, _ = compressed_with_lse(*operands, case.batch.step, nsa=SMALL)
        found = compressed_backward(
            *operands, out, lse, case.d_out, case.batch.step, nsa=SMALL,
            query_tile=tiles[0], entry_tile=tiles[1],
        )  # fmt: skip
    for gradient, want in zip(found, wanted(case)[1:], strict=True):
        assert_close(gradient, want, TOLERANCE[torch.float32])


def test_a_long_sequence_among_short_ones_is_read_by_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(LONE, SMALL, [16, 16, 80])
    operands = (case.q, case.k_entries, case.v_entries)
    copied = compressed_with_lse(*operands, case.batch.step, nsa=SMALL)
    monkeypatch.setattr("nsa_serve.kernels.gpu.compressed_training.MOST_COPIES", 2)
    with poisoned_memory():
        paged = compressed_with_lse(*operands, case.batch.step, nsa=SMALL)
    for one, other in zip(paged, copied, strict=True):
        assert torch.equal(one, other)


def test_strided_queries_and_gradients_are_read_as_they_lie() -> None:
    case = make_case(LONE, SMALL, [32])
    found = run(case, "gpu")
    wide = torch.cat([case.q, torch.full_like(case.q, torch.nan)], 1)[:, : case.q.shape[1]]
    odd = torch.cat([case.q, torch.full_like(case.q[..., :1], torch.nan)], 2)[..., :-1]
    spread = case.d_out.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (replace(case, q=wide, d_out=spread), replace(case, q=odd)):
        assert not strided.q.is_contiguous()
        operands = (strided.q, case.k_entries, case.v_entries)
        out, lse, _ = compressed_with_lse(*operands, case.batch.step, nsa=SMALL)
        back = compressed_backward(*operands, out, lse, strided.d_out, case.batch.step, nsa=SMALL)
        for one, other in zip([out, *back], [found[0], *found[2:]], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("ops", [reference, gpu], ids=["torch", "triton"])
def test_operands_that_do_not_fit_are_refused(ops: Any) -> None:
    case = make_case(G3, SMALL, [32])
    q, k, v, step = case.q, case.k_entries, case.v_entries, case.batch.step
    bad = [(q[..., :8], k, v), (q[:, :3], k, v), (q, k[1:], v[1:]), (q, k[1:], v)]
    if ops is gpu:
        bad += [(q, k, v[..., :3]), (q.half(), k, v)]
    for operands in bad:
        with pytest.raises(ContractError):
            ops.compressed_with_lse(*operands, step, nsa=SMALL)


def test_the_branch_passes_gradcheck() -> None:
    case = make_case(G3, NSAShape(4, 2, 4, num_selected=3, window=4), [16, 4], torch.float64)
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (case.q, case.k_entries, case.v_entries)]

    def branch(*operands: Tensor) -> Tensor:
        return compressed_branch(*operands, case.batch, nsa=case.nsa)[0]

    assert torch.autograd.gradcheck(branch, leaves, fast_mode=True)


# φ


def make_phi(kind: str, hkv: int, dim: int, length: int, *, position: bool) -> Phi:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * length**-0.5

    tensors: dict[str, Tensor] = {}
    name, _, form = kind.partition("-")
    if name == "weighted":
        tensors = {"weight": normal(hkv, length)}
    elif form == "shared":
        tensors = {"weight": normal(length * dim, dim)}
    elif form == "low_rank":
        tensors = {"down": normal(hkv, length * dim, 3), "up": normal(hkv, 3, dim)}
    elif name == "linear":
        tensors = {"weight": normal(hkv, length * dim, dim)}
    elif name == "mlp":
        wide = length * dim
        tensors = {"down": normal(wide, wide), "up": normal(wide, dim)}
    if position:
        tensors["position"] = normal(hkv, length, dim)
    return Phi(CompressKind(name), **tensors)


KINDS = ["mean", "weighted", "linear", "linear-shared", "linear-low_rank", "mlp"]
TENSORS = [field.name for field in fields(Phi) if field.name != "kind"]
INV_FREQ = torch.tensor([0.9, 0.2], dtype=torch.float64)  # 4 of 6 dimensions


def phi_leaves(phi: Phi, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to(dtype, copy=True).requires_grad_()
        for name in TENSORS
        if (tensor := getattr(phi, name)) is not None
    }


def gradients_of(
    entries: Callable[..., Tensor], phi: Phi, dtype: torch.dtype, lens: list[int]
) -> list[Tensor]:
    """Entries, and gradients of the raw tokens and of φ's tensors for a fixed random loss."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(sum(lens), 2, 6, generator=generator, dtype=torch.float64)
    x = raw.to(dtype).requires_grad_()
    leaves = phi_leaves(phi, dtype)
    found = entries(x, Phi(phi.kind, **leaves))
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    found.backward(weights.to(found.dtype))
    return [found.detach(), x.grad, *(leaf.grad for leaf in leaves.values())]


def oracles_entries(lens: list[int], nsa: NSAShape, *, before_rope: bool) -> Callable[..., Tensor]:
    sizes = {"l": nsa.compress_len, "d": nsa.compress_stride}
    turn = {"inv_freq": INV_FREQ, "scale": 1.5} if before_rope else {}

    def entries(x: Tensor, phi: Phi) -> Tensor:
        parts = []
        for tokens in x.split(lens):
            own = {name: getattr(phi, name) for name in TENSORS}
            found = oracle.entries(tokens, phi.kind.value, **sizes, **turn, **own)
            slots = torch.zeros(len(tokens) // sizes["d"], *found.shape[1:], dtype=torch.float64)
            parts.append(torch.cat([slots[: nsa.overlap - 1], found]))
        return torch.cat(parts)

    return entries


def packed_entries(lens: list[int], nsa: NSAShape, *, before_rope: bool) -> Callable[..., Tensor]:
    batch = PackedBatch.build(lens, nsa=nsa, device="cpu")
    turn = {"inv_freq": INV_FREQ, "rope_scale": 1.5} if before_rope else {}

    def entries(x: Tensor, phi: Phi) -> Tensor:
        if before_rope:
            at = batch.positions.tolist()
            turned = [oracle.rotate(row, t, INV_FREQ, 1.5) for row, t in zip(x, at, strict=True)]
            x = torch.stack(turned).to(x.dtype)
        return compress_packed(x, phi, batch, nsa=nsa, **turn)

    return entries


@pytest.mark.parametrize("before_rope", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("position", [False, True], ids=["plain", "position"])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_and_their_gradients_are_the_oracles(
    kind: str, position: bool, before_rope: bool
) -> None:
    lens = [32, 16, 48]
    phi = make_phi(kind, 2, 6, SMALL.compress_len, position=position)
    turn = {"before_rope": before_rope}
    want = gradients_of(oracles_entries(lens, SMALL, **turn), phi, torch.float64, lens)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        found = gradients_of(packed_entries(lens, SMALL, **turn), phi, dtype, lens)
        for one, other in zip(found, want, strict=True):
            assert one.dtype == dtype
            assert_close(one, other, tolerance)


@pytest.mark.parametrize("nsa", [SHAPES[1], SHAPES[4]], ids=["l = d", "l = 4d"])
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear-shared"])
def test_entries_span_any_number_of_strides(kind: str, nsa: NSAShape) -> None:
    lens = [16, 32]
    phi = make_phi(kind, 2, 6, nsa.compress_len, position=True)
    want, found = (
        gradients_of(make(lens, nsa, before_rope=False), phi, torch.float64, lens)
        for make in (oracles_entries, packed_entries)
    )
    for one, other in zip(found, want, strict=True):
        assert_close(one, other, TOLERANCE[torch.float64])


def test_an_mlp_in_parts_is_the_mlp_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [32, 48]
    phi = make_phi("mlp", 2, 6, SMALL.compress_len, position=True)
    entries = packed_entries(lens, SMALL, before_rope=False)
    whole = gradients_of(entries, phi, torch.float64, lens)
    monkeypatch.setattr("nsa_serve.kernels.training.compress._HIDDEN_BUDGET", 3 * 2 * 2 * 48)
    for one, other in zip(gradients_of(entries, phi, torch.float64, lens), whole, strict=True):
        assert_close(one, other, TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", KINDS)
def test_entries_in_fp16_are_the_servings(kind: str) -> None:
    lens = [48, 32]
    phi = make_phi(kind, 2, 6, SMALL.compress_len, position=True)
    halves = Phi(phi.kind, **{k: v.detach() for k, v in phi_leaves(phi, torch.float16).items()})
    batch = PackedBatch.build(lens, nsa=SMALL, device="cpu")
    x = torch.randn(80, 2, 6, generator=torch.Generator().manual_seed(1)).half()
    found = compress_packed(x, halves, batch, nsa=SMALL)
    first = torch.tensor([*range(0, 41, 4), *range(48, 73, 4)])
    windows = x[first[:, None] + torch.arange(8)].transpose(1, 2)  # [E, Hkv, l, D]
    compressor = Compressor(k=halves, v=halves)
    want, _ = reference.compress(windows, windows, first_positions=first, compressor=compressor)
    is_entry = torch.ones(20, dtype=torch.bool)
    is_entry[[0, 12]] = False
    assert_close(found[is_entry], want, 2e-3)
    assert torch.equal(found[~is_entry], torch.zeros_like(found[~is_entry]))


def test_phi_without_its_tensors_or_of_another_shape_is_refused() -> None:
    batch = PackedBatch.build([16], nsa=SMALL, device="cpu")
    x = torch.zeros(16, 2, 6)
    for phi in (Phi(CompressKind.LINEAR), Phi(position=torch.zeros(2, 4, 6))):
        with pytest.raises(ContractError):
            compress_packed(x, phi, batch, nsa=SMALL)
    with pytest.raises(ContractError, match="T, Hkv, D"):
        compress_packed(x[1:], Phi(), batch, nsa=SMALL)


# The importance of blocks


def test_block_importance_is_the_oracles_score() -> None:
    case = make_case(G3, SMALL, [80, 16, 48])
    nsa, lengths = case.nsa, {"l": case.nsa.compress_len, "d": case.nsa.compress_stride}
    found = block_importance(case.q, case.k_entries, case.batch, nsa=nsa)
    assert found.shape == (144, 2, 5)
    for tokens, entries in case.parts():
        at = list(range(tokens.stop - tokens.start))
        operands = (case.q[tokens], case.k_entries[entries], case.v_entries[entries])
        _, shares = oracle.compressed(*operands, at, **lengths)
        for row, share, t in zip(found[tokens], shares, at, strict=True):
            score = oracle.scores(share, t, num_kv_heads=2, page=nsa.page, **lengths)
            width = score.shape[1]
            assert_close(row[:, :width], score, 1e-5)
            assert torch.equal(row[:, width:], torch.zeros_like(row[:, width:]))
    some = torch.tensor([143, 0, 81, 40])
    part = block_importance(case.q[some], case.k_entries, case.batch, nsa=nsa, tokens=some)
    torch.testing.assert_close(part, found[some])


def test_block_importance_passes_gradcheck() -> None:
    nsa = NSAShape(4, 2, 4, num_selected=3, window=4)
    case = make_case(G3, nsa, [16, 8], torch.float64)
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (case.q, case.k_entries)]
    weight = torch.randn(24, 2, 4, dtype=torch.float64)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return (block_importance(q, k, case.batch, nsa=nsa) * weight).sum()

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
