"""The first half of an MLP in one launch, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_serve.kernels import gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.gpu.swiglu_product import TILES, swiglu_product

SMALL = replace(TILES, columns=16, steps=16, warps=1, stages=2, least_programs=1)
CASES = [
    pytest.param(
        "cpu", torch.float32, 35, 48, SMALL,
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted without a GPU"),
    ),
    pytest.param("cuda", torch.bfloat16, 14_336, 4096, TILES, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 8250, 1024, TILES, marks=pytest.mark.gpu),
]  # fmt: skip


def normal(*shape: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize(("device", "dtype", "width", "num_in", "tiles"), CASES)
@pytest.mark.parametrize("rows", [1, 3, 15, 16, 17])
def test_it_is_the_product_and_its_activation_whatever_else_is_in_the_step(
    device, dtype, width, num_in, tiles, rows
):
    x = normal(rows, num_in + 8, device=device, dtype=dtype, seed=rows)[:, :num_in]
    weight = normal(2 * width, num_in, device=device, dtype=dtype, seed=1) / num_in**0.5
    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    wanted = F.silu(gate) * up
    found = swiglu_product(x, weight, tiles=tiles)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    if tiles.serve(rows, weight):
        assert torch.equal(swiglu_product(x[-1:], weight, tiles=tiles), found[-1:])


def test_one_launch_serves_few_tokens_and_weights_that_fill_the_device():
    wide = torch.empty(2 * 64 * 128, 256, device="meta")
    assert TILES.serve(16, wide)
    assert not TILES.serve(17, wide)
    assert not TILES.serve(1, wide[2 * 64 :])
    assert not TILES.serve(1, wide[:, :200])


@pytest.mark.parametrize("backend", [gpu, reference])
def test_widths_that_differ_are_refused(backend):
    with pytest.raises(ContractError, match="differ in width"):
        backend.swiglu_product(torch.zeros(2, 32), torch.zeros(8, 48))


def test_no_rows_give_no_rows():
    assert swiglu_product(torch.zeros(0, 48), torch.zeros(70, 48), tiles=SMALL).shape == (0, 35)
