"""RMSNorm, rotary embedding and SwiGLU against transformers' own and against fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from nsa_serve.kernels import reference
from nsa_serve.kernels.contracts import ContractError
from tests import oracle


def norm_in_fp64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_llama_does(dtype: torch.dtype) -> None:
    theirs = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(96))
    x = torch.randn(7, 96).to(dtype)
    ours, expected = reference.rms_norm(x, theirs.weight.detach(), eps=1e-5), theirs(x)
    # Sums in another order move a row's scale by a rounding of fp32, and so a value at a border by
    # one of its type. Weights multiplied on before the rounding would move a quarter of them.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=2 * step, atol=0)
    assert (ours == expected).float().mean() > 0.98


@given(st.integers(1, 5), st.integers(1, 130), st.sampled_from([1e-3, 1.0, 1e4]))
def test_rms_norm_of_fp32_is_exact_to_rounding(rows: int, width: int, size: float) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    x, weight = size * torch.randn(rows, width, generator=generator), torch.rand(width)
    got = reference.rms_norm(x, weight, eps=1e-6)
    torch.testing.assert_close(got.double(), norm_in_fp64(x, weight, 1e-6), atol=1e-6, rtol=1e-5)


def test_add_rms_norm_returns_the_sum_and_leaves_its_inputs() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    before = x.clone(), residual.clone()
    normed, total = reference.add_rms_norm(x, residual, weight, eps=1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(total, weight, eps=1e-6))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("rotary", [8, 16, 32])
def test_qkv_is_split_and_the_first_dimensions_rotated(rotary: int) -> None:
    positions, inv_freq = [0, 3, 1000], 500.0 ** -torch.linspace(0, 1, rotary // 2)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * inv_freq.double()
    qkv = torch.randn(3, 4 * 32 + 2 * 32 + 2 * 16)
    q, k, v = reference.qkv_norm_rope(
        qkv, angles.cos().float(), angles.sin().float(),
        num_q_heads=4, num_kv_heads=2, head_dim_k=32, head_dim_v=16,
    )  # fmt: skip
    heads = qkv[:, : 6 * 32].view(3, 6, 32)
    want = torch.stack([oracle.rotate(heads[i], p, inv_freq) for i, p in enumerate(positions)])
    torch.testing.assert_close(torch.cat([q, k], 1).double(), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(v, qkv[:, 6 * 32 :].view(3, 2, 16))


def test_rotation_is_the_one_of_llama_checkpoints() -> None:
    qkv = torch.randn(5, 6 * 16)
    angles = torch.arange(5.0)[:, None] * 10.0 ** -torch.linspace(0, 1, 8)
    q, k, _ = reference.qkv_norm_rope(
        qkv, angles.cos(), angles.sin(),
        num_q_heads=2, num_kv_heads=2, head_dim_k=16, head_dim_v=16,
    )  # fmt: skip
    doubled = torch.cat([angles, angles], -1)[None]
    theirs = apply_rotary_pos_emb(
        qkv[:, :32].view(1, 5, 2, 16).transpose(1, 2),
        qkv[:, 32:64].view(1, 5, 2, 16).transpose(1, 2),
        doubled.cos(),
        doubled.sin(),
    )
    for ours, other in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(ours, other[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_normalised_before_they_are_rotated(dtype: torch.dtype) -> None:
    qkv, weights = torch.randn(2, 5 * 16).to(dtype), torch.rand(2, 16).to(dtype)
    still = torch.ones(2, 8), torch.zeros(2, 8)
    q, k, v = reference.qkv_norm_rope(
        qkv, *still, num_q_heads=3, num_kv_heads=1, head_dim_k=16, head_dim_v=16,
        q_norm=weights[0], k_norm=weights[1], eps=1e-6,
    )  # fmt: skip
    heads = qkv.view(2, 5, 16)
    assert torch.equal(q, reference.rms_norm(heads[:, :3], weights[0], eps=1e-6))
    assert torch.equal(k, reference.rms_norm(heads[:, 3:4], weights[1], eps=1e-6))
    assert torch.equal(v, heads[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_gates_the_second_half_with_the_first(dtype: torch.dtype) -> None:
    gate_up = torch.randn(4, 20).to(dtype)
    gate, up = gate_up[:, :10].double(), gate_up[:, 10:].double()
    out = reference.swiglu(gate_up)
    assert out.dtype == dtype
    torch.testing.assert_close(out, (oracle.silu(gate) * up).to(dtype))


def test_a_projection_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ContractError, match=r"sizes=\[64, 32, 32\]"):
        reference.qkv_norm_rope(
            torch.zeros(1, 100), torch.ones(1, 8), torch.zeros(1, 8),
            num_q_heads=4, num_kv_heads=2, head_dim_k=16, head_dim_v=16,
        )  # fmt: skip
