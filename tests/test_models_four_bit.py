"""Weights in 4-bit groups are read as the file stores them, and multiplied as such."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_serve.models.four_bit import FourBitRows, FourBitWeight, four_bit_rows
from nsa_serve.models.linear import FourBitLinear, build_linear, uses_four_bit
from nsa_serve.models.loader import load_four_bit, load_weights, num_four_bit_bytes

from .checkpoints import (
    CPU,
    TINY_LLAMA,
    open_model,
    random_tensors,
    write_checkpoint,
    write_config,
    write_gguf,
)

WIDE_LLAMA = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96}
KINDS = [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1]


def stored(kind: gguf.GGMLQuantizationType, rows: int = 48, width: int = 96) -> FourBitRows:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).numpy()
    return four_bit_rows(gguf.quants.quantize(weight, kind), kind.name, (rows, width))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_dequantise_as_the_gguf_library_says(kind: gguf.GGMLQuantizationType) -> None:
    raw = gguf.quants.quantize(np.random.default_rng(0).normal(size=(8, 64)), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    found = four_bit_rows(raw, kind.name, (8, 64)).dequantised()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 300])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_equal_those_of_dequantised_weights_within_rounding(
    kind: gguf.GGMLQuantizationType, biased: bool, rows: int
) -> None:
    weight = stored(kind)
    bias = torch.randn(48) if biased else None
    half = None if bias is None else bias.bfloat16()
    x = torch.randn(rows, 192).bfloat16()[:, ::2]
    linear = build_linear(
        weight.dequantised().bfloat16(), half, four_bit=FourBitWeight.of([weight])
    )
    assert isinstance(linear, FourBitLinear)
    found, expected = linear(x), F.linear(x.float(), weight.dequantised(), bias)
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 0.006


def test_parts_of_a_fused_weight_stand_one_after_the_other() -> None:
    parts = [stored(KINDS[0], rows=16), stored(KINDS[1], rows=8), stored(KINDS[1], rows=24)]
    x = torch.randn(2, 96).bfloat16()
    expected = F.linear(x.float(), torch.cat([part.dequantised() for part in parts]))
    assert error(FourBitWeight.of(parts).product(x), expected) < 0.006


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_gguf_files_fused_and_permuted_rows_equal_those_loaded_in_fp32(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    write_config(tmp_path, WIDE_LLAMA)
    path = write_gguf(tmp_path / "m.gguf", WIDE_LLAMA, random_tensors(tmp_path), quantised=kind)
    checkpoint, config = open_model(path)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    found = load_four_bit(checkpoint, config)
    held = sum(weight.packed.nbytes + weight.scales.nbytes for weight in found.values())
    assert num_four_bit_bytes(checkpoint, config) == held > 0
    layers = {
        f"layers.{i}.{part}.weight" for i in range(2) for part in ("qkv", "o", "gate_up", "down")
    }
    assert found.keys() == layers | {"embed", "lm_head"}
    for name, weight in found.items():
        x = torch.randn(3, weights[name].shape[1]).bfloat16()
        assert error(weight.product(x), F.linear(x.float(), weights[name])) < 0.006, name


def test_parameters_that_are_not_all_of_4_bit_groups_have_no_such_form(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "plain", WIDE_LLAMA)
    assert load_four_bit(*open_model(folder)) == {}
    tensors = random_tensors(folder)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "m.gguf", WIDE_LLAMA, tensors, quantised=kind)
    assert load_four_bit(*open_model(path)) == {}


def test_only_bf16_on_a_cpu_multiplies_in_4_bits() -> None:
    assert not uses_four_bit(CPU, torch.float32)
    assert not uses_four_bit(torch.device("cuda"), torch.bfloat16)


def test_deterministic_products_are_of_the_plain_weights() -> None:
    weight = stored(KINDS[1])
    plain, packed = weight.dequantised().bfloat16(), FourBitWeight.of([weight])
    linear = build_linear(plain, four_bit=packed, deterministic=True)
    assert not isinstance(linear, FourBitLinear)
