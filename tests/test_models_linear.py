"""Matrix products on a CPU: packed bf16 weights give what plain ones give, for any rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nsa_serve.config import DType
from nsa_serve.models import linear
from nsa_serve.models.linear import (
    Linear,
    PackedLinear,
    activation_dtype,
    build_linear,
    choose_dtype,
)

CPU = torch.device("cpu")


def weights(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(48, 96).to(dtype), torch.randn(48).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_bf16_products_equal_fp32_ones_within_rounding(rows: int, biased: bool) -> None:
    weight, bias = weights(torch.bfloat16)
    bias = bias if biased else None
    # Every other column: rows of a view, as those of a fused product are.
    x = torch.randn(rows, 192).bfloat16()[:, ::2]
    found = build_linear(weight, bias)(x)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.01)


def test_few_and_many_rows_give_the_same_product() -> None:
    weight, bias = weights(torch.bfloat16)
    x = torch.randn(400, 96).bfloat16()
    packed = build_linear(weight, bias)
    parts = torch.cat([packed(part) for part in x.split(50)])
    torch.testing.assert_close(packed(x), parts, atol=0.05, rtol=0.01)


def test_other_types_keep_the_plain_product() -> None:
    weight, bias = weights(torch.float32)
    x = torch.randn(5, 96)
    plain = build_linear(weight, bias)
    assert isinstance(plain, Linear)
    assert torch.equal(plain(x), F.linear(x, weight, bias))


def test_a_cpu_without_bf16_products_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: False)
    assert choose_dtype(DType.AUTO, CPU) == torch.float32
    assert choose_dtype(DType.BFLOAT16, CPU) == torch.bfloat16
    assert isinstance(build_linear(*weights(torch.bfloat16)), Linear)


def test_auto_is_bf16_where_it_is_fast() -> None:
    assert choose_dtype(DType.AUTO, torch.device("cuda")) == torch.bfloat16
    expected = torch.bfloat16 if linear.has_fast_bf16() else torch.float32
    assert choose_dtype(DType.AUTO, CPU) == expected
    assert choose_dtype(DType.FLOAT16, CPU) == torch.float16


def test_steps_of_many_tokens_are_computed_in_fp32_where_products_widen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, _ = weights(torch.bfloat16)
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(linear, "_has_amx", lambda: False)
    found = [activation_dtype(n, weight, deterministic=False) for n in (1, 127, 128)]
    assert found == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert activation_dtype(128, weight, deterministic=True) == torch.bfloat16
    monkeypatch.setattr(linear, "_has_amx", lambda: True)
    assert activation_dtype(128, weight, deterministic=False) == torch.bfloat16


@pytest.mark.skipif(not linear.has_fast_bf16(), reason="this CPU does not multiply bf16 natively")
@pytest.mark.parametrize("rows", [3, 200])
def test_fp32_rows_get_fp32_products_of_bf16_weights(rows: int) -> None:
    weight, bias = weights(torch.bfloat16)
    x = torch.randn(rows, 96)
    found = PackedLinear(weight, bias)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, F.linear(x, weight.float(), bias.float()), atol=0.2, rtol=0.02
    )
