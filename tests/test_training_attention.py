"""NSA in training: gradients against fp64 autograd of the oracle, and the kernels' own bookkeeping.

Triton kernels run in the interpreter here, and are compared with their twins in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_serve.kernels import dispatch, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.shapes import Branch, CompressKind, Compressor, NSAShape, Phi
from nsa_serve.kernels.training.attention import ALL_BRANCHES, nsa_attention
from nsa_serve.kernels.training.packed import PackedBatch, as_pages
from nsa_serve.kernels.training.sparse_branches import sparse_branches
from tests import oracle
from tests.kernel_runs import interpreted, poisoned_memory
from tests.paged import Heads

SMALL = NSAShape(8, 4, 16, num_selected=4, window=24)


@dataclass(frozen=True, slots=True)
class Packed:
    """Leaves of a packed batch, and a gradient of the output."""

    heads: Heads
    nsa: NSAShape
    batch: PackedBatch
    q: Tensor
    k: Tensor
    v: Tensor
    gate_logits: Tensor
    out_compressed: Tensor
    d_out: Tensor
    selection: Tensor  # random but for the forced blocks

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.gate_logits

    def sequences(self) -> list[slice]:
        return [slice(a, b) for a, b in pairwise(self.batch.cu_seqlens.tolist())]

    def to(self, dtype: torch.dtype) -> Packed:
        """New leaves of the same values."""
        leaves = (*self.leaves, self.out_compressed)
        new = [x.detach().to(dtype).requires_grad_() for x in leaves]
        d_out = self.d_out.to(dtype)
        return Packed(self.heads, self.nsa, self.batch, *new, d_out, self.selection)


def make_packed(
    heads: Heads, nsa: NSAShape, lens: Sequence[int], dtype: torch.dtype, seed: int = 0
) -> Packed:
    gen = torch.Generator().manual_seed(seed)
    batch = PackedBatch.build(lens, nsa=nsa, device="cpu")
    tokens = batch.num_tokens

    def leaf(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=gen).to(dtype).requires_grad_()

    scores = torch.rand(tokens, heads.num_kv, max(lens) // nsa.page, generator=gen)
    return Packed(
        heads, nsa, batch,
        q=leaf(heads.num_q, heads.dim_k),
        k=leaf(heads.num_kv, heads.dim_k),
        v=leaf(heads.num_kv, heads.dim_v),
        gate_logits=leaf(heads.num_q, 3),
        out_compressed=leaf(heads.num_q, heads.dim_v),
        d_out=torch.randn(tokens, heads.num_q, heads.dim_v, generator=gen).to(dtype),
        selection=reference.select_blocks(scores, batch.positions, nsa=nsa),
    )  # fmt: skip


def sparse_of(case: Packed, branches: frozenset[Branch] = frozenset(Branch)) -> Tensor:
    return sparse_branches(
        case.q, case.k, case.v, case.out_compressed, case.gate_logits, case.selection, case.batch,
        nsa=case.nsa, branches=branches,
    )  # fmt: skip


def gradients(out: Tensor, case: Packed, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, case.d_out.to(out.dtype))


def assert_near(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        assert float(error.detach()) <= tolerance  # False for NaN as well


def oracle_nsa(case: Packed, span: slice, weight: Tensor, position: Tensor) -> Tensor:
    """The oracle's formulas over one sequence, its own compression and selection included."""
    q, k, v, gates = (x[span] for x in case.leaves)
    nsa, positions = case.nsa, list(range(span.stop - span.start))
    sizes = {"l": nsa.compress_len, "d": nsa.compress_stride}
    k_entries = oracle.entries(k, "weighted", weight=weight, **sizes)
    v_entries = oracle.entries(v, "mean", position=position, **sizes)
    compressed, shares = oracle.compressed(q, k_entries, v_entries, positions, **sizes)
    selection = []
    for t, share in enumerate(shares):
        rows = oracle.scores(
            share.detach(), t, num_kv_heads=case.heads.num_kv, page=nsa.page, **sizes
        )
        choose = partial(
            oracle.select, t=t, page=nsa.page, n=nsa.num_selected,
            initial=nsa.num_initial, local=nsa.num_local,
        )  # fmt: skip
        selection.append([choose(row) for row in rows])
    selected = oracle.selected(q, k, v, positions, selection, page=nsa.page)
    window = oracle.window(q, k, v, positions, w=nsa.window)
    return oracle.gated([compressed, selected, window], gates)


@pytest.mark.parametrize(
    ("heads", "nsa", "lens"),
    [
        (Heads(num_q=6, num_kv=2, dim_k=8, dim_v=5), SMALL, [16, 96]),
        (Heads(num_q=2, num_kv=2, dim_k=4, dim_v=6), NSAShape(8, 8, 16, 3, window=7), [80, 32]),
        (Heads(num_q=16, num_kv=1, dim_k=4, dim_v=4), NSAShape(4, 2, 8, 3, window=64), [40]),
    ],
)
def test_gradients_of_the_whole_are_those_of_the_oracle(heads, nsa, lens) -> None:
    case = make_packed(heads, nsa, lens, torch.float64)
    sizes = (heads.num_kv, nsa.compress_len)
    weight = torch.rand(sizes, dtype=torch.float64).requires_grad_()
    position = torch.randn(*sizes, heads.dim_v, dtype=torch.float64).requires_grad_()
    compressor = Compressor(k=Phi(CompressKind.WEIGHTED, weight=weight), v=Phi(position=position))
    out = nsa_attention(*case.leaves, case.batch, nsa=nsa, compressor=compressor)
    wanted = torch.cat([oracle_nsa(case, span, weight, position) for span in case.sequences()])
    leaves = (*case.leaves, position, weight)
    assert_near([out], [wanted], 1e-12)
    assert_near(gradients(out, case, leaves), gradients(wanted, case, leaves), 1e-11)


def test_gradients_are_those_of_finite_differences() -> None:
    heads, nsa = Heads(num_q=4, num_kv=2, dim_k=3, dim_v=2), NSAShape(4, 2, 8, 3, window=6)
    case = make_packed(heads, nsa, [8, 24], torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, compressed: Tensor, gates: Tensor) -> Tensor:
        return sparse_branches(
            q, k, v, compressed, gates, case.selection, case.batch, nsa=nsa, branches=ALL_BRANCHES
        )

    inputs = (case.q, case.k, case.v, case.out_compressed, case.gate_logits)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_with_all_blocks_selected_and_gates_0_1_0_gradients_are_those_of_dense_attention() -> None:
    heads, nsa = Heads(num_q=6, num_kv=2, dim_k=8, dim_v=8), NSAShape(8, 4, 16, 6, window=20)
    case = make_packed(heads, nsa, [nsa.dense_len], torch.float64)
    gates = torch.tensor([-torch.inf, torch.inf, -torch.inf], dtype=torch.float64)
    fixed = gates.expand(case.batch.num_tokens, heads.num_q, 3)
    out = nsa_attention(case.q, case.k, case.v, fixed, case.batch, nsa=nsa, compressor=Compressor())
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = dense[0].transpose(0, 1)
    leaves = (case.q, case.k, case.v)
    assert_near([out], [wanted], 1e-13)
    assert_near(gradients(out, case, leaves), gradients(wanted, case, leaves), 1e-12)


def test_sequences_packed_together_have_the_gradients_of_each_alone() -> None:
    heads, lens = Heads(num_q=4, num_kv=2, dim_k=8, dim_v=8), [48, 16, 80]
    case = make_packed(heads, SMALL, lens, torch.float64)
    attend = partial(nsa_attention, nsa=SMALL, compressor=Compressor())
    together = gradients(attend(*case.leaves, case.batch), case, case.leaves)
    for span, length in zip(case.sequences(), lens, strict=True):
        alone = PackedBatch.build([length], nsa=SMALL, device="cpu")
        leaves = [x.detach()[span].requires_grad_() for x in case.leaves]
        found = torch.autograd.grad(attend(*leaves, alone), leaves, case.d_out[span])
        assert_near([grad[span] for grad in together], found, 1e-13)


@interpreted
@pytest.mark.parametrize("backend", ["reference", "gpu"], ids="kernels/{}".format)
def test_padding_touches_nothing_in_a_sequence_shorter_than_an_entry(backend: str) -> None:
    heads, length = Heads(num_q=2, num_kv=1, dim_k=16, dim_v=16), SMALL.compress_len - 3
    case = make_packed(heads, SMALL, [16, 16], torch.float32)
    kept = case.batch.positions < length
    with dispatch.use(backend), poisoned_memory():
        out = nsa_attention(*case.leaves, case.batch, nsa=SMALL, compressor=Compressor())[kept]
        found = torch.autograd.grad(out, case.leaves, case.d_out[kept])
    ones = [torch.ones(1, SMALL.compress_len)] * 2
    starts = case.batch.cu_seqlens.tolist()[:-1]
    wanted = torch.cat([oracle_nsa(case, slice(at, at + length), *ones) for at in starts])
    assert_near([out], [wanted], 1e-6)
    assert_near(found, torch.autograd.grad(wanted, case.leaves, case.d_out[kept]), 1e-5)


@pytest.mark.parametrize("left", [{b} for b in Branch] + [set(Branch) - {b} for b in Branch])
def test_a_left_out_branch_is_one_with_a_gate_of_0(left) -> None:
    case = make_packed(Heads(num_q=4, num_kv=2, dim_k=8, dim_v=8), SMALL, [64], torch.float64)
    attend = partial(nsa_attention, batch=case.batch, nsa=SMALL, compressor=Compressor())
    out = attend(*case.leaves, branches=left)
    closed = torch.tensor([0.0 if branch in left else -torch.inf for branch in Branch])
    wanted = attend(case.q, case.k, case.v, case.gate_logits + closed)
    assert_near([out], [wanted], 1e-14)
    found, expected = (gradients(x, case, case.leaves) for x in (out, wanted))
    assert_near(found, expected, 1e-13)
    assert bool((found[3][..., closed != 0] == 0).all())


def test_no_branch_and_gates_of_another_shape_are_refused() -> None:
    case = make_packed(Heads(), SMALL, [32], torch.float32)
    attend = partial(nsa_attention, batch=case.batch, nsa=SMALL, compressor=Compressor())
    with pytest.raises(ContractError, match="no branch is left"):
        attend(*case.leaves, branches=frozenset())
    with pytest.raises(ContractError, match=r"gates are not \[T, Hq, 3\]"):
        attend(case.q, case.k, case.v, case.gate_logits[..., :2])


def test_a_packed_batch_names_pages_by_their_place() -> None:
    batch = PackedBatch.build([16, 48], nsa=SMALL, device="cpu")
    assert batch.num_tokens == 64
    assert batch.cu_seqlens.tolist() == [0, 16, 64]
    assert batch.positions.tolist() == [*range(16), *range(48)]
    assert batch.step.block_table.tolist() == [[0, -1, -1], [1, 2, 3]]
    assert batch.step.token_rows.tolist() == [0] * 16 + [1] * 48
    x = torch.randn(64, 2, 3)
    pages = as_pages(x, 16)
    assert pages.data_ptr() == x.data_ptr()
    assert torch.equal(pages[2, 1, 5], x[37, 1])


@pytest.mark.parametrize("lens", [[], [0], [16, 17], [-16]])
def test_sequences_that_are_no_whole_pages_are_refused(lens) -> None:
    with pytest.raises(ContractError, match="whole pages"):
        PackedBatch.build(lens, nsa=SMALL, device="cpu")


def test_a_step_that_is_no_whole_sequences_is_refused() -> None:
    case = make_packed(Heads(), SMALL, [32], torch.float32)
    longer = NSAShape(8, 4, 64, num_selected=4, window=24)
    with pytest.raises(ContractError, match="whole pages"):
        reference.window_with_lse(case.q, case.k, case.v, case.batch.step, nsa=longer)


# Few blocks are chosen, and few forced: most tokens leave some out.
SPARSE = NSAShape(8, 4, 16, num_selected=2, num_initial=0, num_local=1, window=24)
ODD = NSAShape(8, 4, 24, num_selected=2, num_initial=0, num_local=1, window=30)
CASES = [
    (Heads(num_q=3, num_kv=1, dim_k=16, dim_v=8), SPARSE, [16, 64], torch.float32),
    (Heads(num_q=16, num_kv=1, dim_k=24, dim_v=16), SPARSE, [48], torch.float16),
    (Heads(num_q=1, num_kv=1, dim_k=16, dim_v=16), ODD, [24, 72], torch.float32),
]


@interpreted
@pytest.mark.parametrize(("heads", "nsa", "lens", "dtype"), CASES)
def test_triton_gradients_are_those_of_the_twin(heads, nsa, lens, dtype) -> None:
    case = make_packed(heads, nsa, lens, dtype)
    leaves = (*case.leaves, case.out_compressed)
    with dispatch.use("gpu"), poisoned_memory():
        out = sparse_of(case)
        found = gradients(out, case, leaves)
    exact = case.to(torch.float64)
    wanted = sparse_of(exact)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    assert_near([out], [wanted], tolerance)
    leaves = (*exact.leaves, exact.out_compressed)
    assert_near(found, gradients(wanted, exact, leaves), tolerance)


@interpreted
@pytest.mark.parametrize("branch", [Branch.SELECTED, Branch.WINDOW])
def test_triton_gradients_of_one_branch_are_those_of_the_twin(branch: Branch) -> None:
    case = make_packed(CASES[0][0], SPARSE, [48], torch.float32)
    with dispatch.use("gpu"), poisoned_memory():
        found = gradients(sparse_of(case, frozenset({branch})), case, case.leaves[:3])
    exact = case.to(torch.float64)
    wanted = gradients(sparse_of(exact, frozenset({branch})), exact, exact.leaves[:3])
    assert_near(found, wanted, 1e-6)


@interpreted
def test_pages_are_listed_once_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_serve.kernels.gpu import page_union, query_backward, sparse_pass, sparse_training

    listed = []

    def unite_pages(*args, **options):
        listed.append(options["tile_tokens"])
        return page_union.unite_pages(*args, **options)

    for module in (query_backward, sparse_pass, sparse_training):
        monkeypatch.setattr(module, "unite_pages", unite_pages)
    case = make_packed(CASES[0][0], SPARSE, [48], torch.float32)
    with dispatch.use("gpu"):
        gradients(sparse_of(case, frozenset({Branch.SELECTED})), case, case.leaves[:3])
    assert len(listed) == 1


@interpreted
def test_pages_that_were_listed_for_other_tiles_are_refused() -> None:
    from nsa_serve.kernels.gpu.page_union import unite_pages
    from nsa_serve.kernels.gpu.sparse_pass import sparse_pass
    from nsa_serve.kernels.shapes import PagedKV

    case = make_packed(CASES[0][0], SPARSE, [64], torch.float32)
    kv = PagedKV(as_pages(case.k.detach(), 16), as_pages(case.v.detach(), 16))
    step = case.batch.step
    union = unite_pages(case.selection, None, step, nsa=SPARSE, tile_tokens=2)
    with pytest.raises(ContractError, match="listed for other tiles"):
        sparse_pass(case.q.detach(), kv, case.selection, step, nsa=SPARSE, union=union)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 64])
@pytest.mark.parametrize("width", [16, 64, 128, 192, 256])
def test_both_passes_of_selected_attention_have_tiles_of_the_same_tokens(group, width) -> None:
    from nsa_serve.kernels.gpu.tuning import sparse_gradient_tile, sparse_tile

    assert sparse_tile(group, width).tokens == sparse_gradient_tile(group, width).tokens


def brute_readers(selection: Tensor, batch: PackedBatch, page: int) -> list[list[list[int]]]:
    """For each KV head and page, the tokens that chose it."""
    lists = [[[] for _ in range(len(selection) // page)] for _ in range(selection.shape[1])]
    for token, position in enumerate(batch.positions.tolist()):
        for head, blocks in enumerate(selection[token].tolist()):
            for block in blocks:
                if block >= 0:
                    lists[head][(token - position) // page + block].append(token)
    return lists


@pytest.mark.parametrize("chunk", [5, 32, 1024])
def test_every_reader_of_a_page_is_in_one_of_its_chunks_in_order(chunk: int) -> None:
    from nsa_serve.kernels.gpu.page_readers import find_readers

    case = make_packed(Heads(num_q=2, num_kv=2), SMALL, [16, 112, 32], torch.float32)
    selection = case.selection.clone()
    selection[5] = -1
    with poisoned_memory():
        readers = find_readers(selection, case.batch.step, nsa=SMALL, chunk=chunk)
    num_pages = case.batch.num_tokens // SMALL.page
    for head, lists in enumerate(brute_readers(selection, case.batch, SMALL.page)):
        found: list[list[int]] = [[] for _ in range(num_pages)]
        starts, firsts = readers.starts[head].tolist(), readers.first_chunks[head].tolist()
        for number, page in enumerate(readers.chunk_pages[head].tolist()):
            assert (page == num_pages) == (number >= firsts[-1])
            if page < num_pages:
                start = starts[page] + (number - firsts[page]) * chunk
                stop = min(start + chunk, starts[page + 1])
                assert stop > start
                found[page] += readers.tokens[head, start:stop].tolist()
        assert found == lists


@interpreted
def test_chunks_of_readers_add_up_to_the_same_gradient() -> None:
    from nsa_serve.kernels.gpu.key_backward import key_backward
    from nsa_serve.kernels.gpu.page_readers import find_readers
    from nsa_serve.kernels.shapes import BranchStats, PagedKV

    case = make_packed(CASES[0][0], SPARSE, [64], torch.float32)
    kv = PagedKV(as_pages(case.k.detach(), 16), as_pages(case.v.detach(), 16))
    stats = BranchStats(torch.rand(64, 3), torch.rand(64, 3))
    sums = []
    for chunk in (7, 1024):
        readers = find_readers(case.selection, case.batch.step, nsa=SPARSE, chunk=chunk)
        parts = key_backward(case.q.detach(), kv, readers, case.d_out, stats, nsa=SPARSE)
        used = readers.chunk_pages[0] < 4
        assert int(used.sum()) > 4 or chunk == 1024
        pages = readers.chunk_pages[0, used].long()
        sums.append([torch.zeros(4, *p.shape[2:]).index_add(0, pages, p[0, used]) for p in parts])
    assert_near(*sums, 1e-6)
