"""The compressed branch in training, in 16 bits on a GPU, against autograd in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nsa_serve.bench.measure import peak_bytes
from nsa_serve.kernels.shapes import CompressKind, NSAShape, Phi
from nsa_serve.kernels.training.compressed import compress_packed, compressed_branch
from nsa_serve.kernels.training.packed import PackedBatch
from tests.kernel_runs import LAYOUTS, poisoned_memory

pytestmark = pytest.mark.gpu

NSA = NSAShape()
# Whole pages at and beside w and n·P, and single pages between them.
LENS = [64, 512, 448, 64, 576, 1024, 960, 1088]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def operands(
    layout: tuple[int, int, int, int], batch: PackedBatch, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k and v of entries, NaN where no entry is; and the output's gradient."""
    hq, hkv, dk, dv = layout
    tokens, slots = batch.num_tokens, batch.num_tokens // NSA.compress_stride
    free = batch.positions[:: NSA.compress_stride] < NSA.compress_len - NSA.compress_stride
    q = normal(tokens, hq, dk, seed=0, dtype=dtype)
    k, v = (normal(slots, hkv, dim, seed=dim + 1, dtype=dtype) for dim in (dk, dv))
    k[free], v[free] = torch.nan, torch.nan
    return [q, k, v], normal(tokens, hq, dv, seed=2, dtype=dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> Tensor:
    """Attention over visible entries, one sequence at a time, all scores at once."""
    outs = []
    for start, stop in pairwise(borders):
        own = slice(start // NSA.compress_stride + NSA.overlap - 1, stop // NSA.compress_stride)
        ends = torch.arange(own.stop - own.start, device="cuda") * NSA.compress_stride
        at = torch.arange(stop - start, device="cuda")
        hidden = (ends + NSA.compress_len - 1 > at[:, None])[:, None, None]
        queries = q[start:stop].unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("tkgd,ckd->tkgc", queries, k[own]) * q.shape[2] ** -0.5
        p = scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)
        outs.append(torch.einsum("tkgc,ckd->tkgd", p, v[own]).flatten(1, 2))
    return torch.cat(outs)


def run(leaves: list[Tensor], d_out: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Output and gradients, with NaN in all memory that is not written."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    with poisoned_memory():
        out, _ = compressed_branch(*leaves, batch, nsa=NSA)
        out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(found: Tensor, want: Tensor, tolerance: float = 1e-2) -> None:
    error = (found.double() - want.double()).norm() / want.double().norm()
    assert float(error) <= tolerance  # False for NaN as well


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_packed_sequences_are_those_of_fp64_autograd(
    layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch = PackedBatch.build(LENS, nsa=NSA, device="cuda")
    tensors, d_out = operands(layout, batch, dtype)
    wide = [x.double().requires_grad_() for x in tensors]
    want = dense(*wide, batch.cu_seqlens.tolist())
    gradients = torch.autograd.grad(want, wide, d_out.double())
    for one, other in zip(run(tensors, d_out, batch), [want.detach(), *gradients], strict=True):
        assert one.dtype == dtype
        assert_near(one, other)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_have_the_same_bytes_every_time(layout: tuple[int, int, int, int]) -> None:
    batch = PackedBatch.build([8192, 64, 4096], nsa=NSA, device="cuda")
    tensors, d_out = operands(layout, batch, torch.bfloat16)
    first = run(tensors, d_out, batch)
    for one, other in zip(run(tensors, d_out, batch), first, strict=True):
        assert torch.equal(one, other)


def test_a_sequence_has_the_gradients_that_it_has_alone() -> None:
    lens, layout = [1088, 640, 64], LAYOUTS[0]
    batch = PackedBatch.build(lens, nsa=NSA, device="cuda")
    tensors, d_out = operands(layout, batch, torch.bfloat16)
    together = run(tensors, d_out, batch)
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        tokens = slice(start, stop)
        slots = slice(start // NSA.compress_stride, stop // NSA.compress_stride)
        own = [tensors[0][tokens], tensors[1][slots], tensors[2][slots]]
        alone = run(own, d_out[tokens], PackedBatch.build([stop - start], nsa=NSA, device="cuda"))
        parts = zip(together, (tokens, tokens, slots, slots), alone, strict=True)
        for whole, part, other in parts:
            assert_near(whole[part], other, 5e-3)


PHI = {
    "mean": {},
    "weighted": {"weight": (2, 32)},
    "linear": {"weight": (2, 32 * 64, 64)},
    "shared linear": {"weight": (32 * 64, 64)},
    "low-rank linear": {"down": (2, 32 * 64, 16), "up": (2, 16, 64)},
    "mlp": {"down": (32 * 64, 32 * 64), "up": (32 * 64, 64)},
}
INV_FREQ = 10_000.0 ** -(torch.arange(32) / 32)


@pytest.mark.parametrize("before_rope", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", PHI)
def test_entries_and_their_gradients_are_those_of_fp64(kind: str, before_rope: bool) -> None:
    batch = PackedBatch.build([576, 64, 320], nsa=NSA, device="cuda")
    shapes = {**PHI[kind], "position": (2, 32, 64)}
    tensors = {
        name: normal(*shape, seed=at) * 0.02 for at, (name, shape) in enumerate(shapes.items())
    }
    x = normal(960, 2, 64, seed=8)
    weight = normal(60, 2, 64, seed=9)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = {k: t.detach().to(dtype, copy=True).requires_grad_() for k, t in tensors.items()}
        tokens = x.to(dtype, copy=True).requires_grad_()
        phi = Phi(CompressKind(kind.split()[-1]), **leaves)
        inv_freq = INV_FREQ.cuda() if before_rope else None
        entries = compress_packed(tokens, phi, batch, nsa=NSA, inv_freq=inv_freq)
        entries.backward(weight.to(dtype))
        found.append([entries.detach(), tokens.grad, *(t.grad for t in leaves.values())])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.bfloat16
        assert_near(one, other)


def test_memory_of_a_long_backward_pass_is_bounded() -> None:
    layout, tokens = LAYOUTS[1], 65536
    batch = PackedBatch.build([tokens], nsa=NSA, device="cuda")
    tensors, d_out = operands(layout, batch, torch.bfloat16)
    tensors = [x.nan_to_num(0.0).requires_grad_() for x in tensors]
    out, _ = compressed_branch(*tensors, batch, nsa=NSA)
    shares = 16 * 4 * (tensors[1].numel() + tensors[2].numel())  # fp32, of 16 ranges
    sums = 2 * 4 * tokens * layout[1] * 4
    peak = peak_bytes(lambda: out.backward(d_out))
    assert peak <= shares + sums + 2 * sum(x.nbytes for x in tensors) + (16 << 20)
