"""NSA's gradients on a GPU: the numbers of the twins in fp64, dense attention's, bytes, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_serve.bench.measure import peak_bytes
from nsa_serve.kernels import dispatch
from nsa_serve.kernels.shapes import Branch, CompressKind, Compressor, NSAShape, Phi
from nsa_serve.kernels.training.attention import nsa_attention
from nsa_serve.kernels.training.compressed import compress_packed, compressed_branch
from nsa_serve.kernels.training.packed import PackedBatch
from nsa_serve.kernels.training.sparse_branches import sparse_branches
from tests.kernel_runs import LAYOUTS

pytestmark = pytest.mark.gpu

NSA = NSAShape()
Layout = tuple[int, int, int, int]


def poison_memory() -> None:
    """What the allocator hands out next is full of NaN, so that what is not written shows."""
    torch.cuda.empty_cache()
    large = torch.full((1 << 29,), torch.nan, device="cuda")
    small = [torch.full((1 << 17,), torch.nan, device="cuda") for _ in range(64)]
    del large, small


def leaves_of(layout: Layout, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and gate logits, and a gradient of the output."""
    hq, hkv, dk, dv = layout
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator, device="cuda").to(dtype)

    leaves = [normal(hq, dk), normal(hkv, dk), normal(hkv, dv), normal(hq, 3)]
    return [x.requires_grad_() for x in leaves], normal(hq, dv)


def attend(
    leaves: list[Tensor], weight: Tensor, batch: PackedBatch, selection: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and selection; implementations are compared on the same selection."""
    q, k, v, gates = leaves
    phi = Phi(CompressKind.WEIGHTED, weight=weight)
    entries = [
        compress_packed(x, phi, batch, nsa=NSA, inv_freq=None, rope_scale=1.0) for x in (k, v)
    ]
    compressed, found = compressed_branch(q, *entries, batch, nsa=NSA)
    chosen = found if selection is None else selection
    branches = frozenset(Branch)
    out = sparse_branches(q, k, v, compressed, gates, chosen, batch, nsa=NSA, branches=branches)
    return out, chosen


def weight_of(layout: Layout, dtype: torch.dtype) -> Tensor:
    weight = torch.linspace(0.01, 0.06, layout[1] * NSA.compress_len, device="cuda")
    return weight.view(layout[1], -1).to(dtype).requires_grad_()


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert float(error.detach()) <= 1e-2  # False for NaN as well


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_twins_in_fp64(layout: Layout, dtype: torch.dtype) -> None:
    batch = PackedBatch.build([64, 1984, 640], nsa=NSA, device="cuda")
    leaves, d_out = leaves_of(layout, batch.num_tokens, dtype)
    inputs = [*leaves, weight_of(layout, dtype)]
    poison_memory()
    out, selection = attend(leaves, inputs[4], batch, None)
    poison_memory()
    found = torch.autograd.grad(out, inputs, d_out)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with dispatch.use("reference"):
        wanted, _ = attend(exact[:4], exact[4], batch, selection)
    assert_near((out, *found), (wanted, *torch.autograd.grad(wanted, exact, d_out.double())))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_of_q_k_v_and_gates_have_the_same_bytes_every_time(layout: Layout) -> None:
    batch = PackedBatch.build([128, 4096], nsa=NSA, device="cuda")
    leaves, d_out = leaves_of(layout, batch.num_tokens, torch.bfloat16)
    weight = weight_of(layout, torch.bfloat16)
    out, selection = attend(leaves, weight, batch, None)
    once = torch.autograd.grad(out, leaves, d_out)
    again = torch.autograd.grad(attend(leaves, weight, batch, selection)[0], leaves, d_out)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_with_all_blocks_selected_gradients_are_those_of_dense_attention(layout: Layout) -> None:
    batch = PackedBatch.build([NSA.dense_len], nsa=NSA, device="cuda")
    (q, k, v, _), d_out = leaves_of(layout, batch.num_tokens, torch.bfloat16)
    gates = torch.tensor([-torch.inf, torch.inf, -torch.inf], device="cuda", dtype=q.dtype)
    fixed = gates.expand(*q.shape[:2], 3)
    out = nsa_attention(q, k, v, fixed, batch, nsa=NSA, compressor=Compressor())
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    turned = (x.transpose(0, 1)[None] for x in exact)
    dense = F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    wanted = dense[0].transpose(0, 1)
    found = torch.autograd.grad(out, (q, k, v), d_out)
    assert_near((out, *found), (wanted, *torch.autograd.grad(wanted, exact, d_out.double())))


def test_a_training_step_takes_at_most_the_memory_of_flash_attention_and_a_third() -> None:
    layout, tokens = LAYOUTS[0], 16384
    batch = PackedBatch.build([tokens], nsa=NSA, device="cuda")
    leaves, d_out = leaves_of(layout, tokens, torch.bfloat16)
    inputs = sum(x.nbytes for x in (*leaves[:3], d_out))

    def sparse() -> None:
        out = nsa_attention(*leaves, batch, nsa=NSA, compressor=Compressor())
        torch.autograd.grad(out, leaves, d_out)

    def flash() -> None:
        q, k, v = (x.transpose(0, 1)[None] for x in leaves[:3])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, leaves[:3], d_out.transpose(0, 1)[None])

    assert inputs + peak_bytes(sparse) <= 1.3 * (inputs + peak_bytes(flash))
