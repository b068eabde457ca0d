"""A part that is taken out has no effect any more, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_serve.config import EngineConfig
from nsa_serve.errors import ConfigError
from nsa_serve.evaluate.ablation import Ablation, ablate
from nsa_serve.evaluate.in_process import InProcess
from nsa_serve.models.config import NSAConfig
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.families.nsa_serve import nsa_to_json
from nsa_serve.models.loader import load_weights
from tests.checkpoints import (
    CPU,
    TINY_LLAMA,
    TINY_NSA,
    nsa_config_json,
    open_model,
    write_checkpoint,
)
from tests.model_steps import PagedModel
from tests.server_process import write_small_model

BRANCHES = [Ablation.COMPRESSED, Ablation.SELECTED, Ablation.WINDOW]
IDS = torch.randint(0, TINY_LLAMA["vocab_size"], (150,), generator=torch.Generator().manual_seed(3))
FUSED = (6 + 2 + 2) * 16  # rows of q, k and v


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    nsa = NSAConfig(TINY_NSA, gated=True, gate_bias=True)
    return write_checkpoint(tmp_path / "model", nsa_config_json(nsa))


def decoder(folder: Path, shut: int | None = None, num_selected: int | None = None) -> Decoder:
    """The model; with the gate of one branch shut by its weights, or with fewer blocks."""
    checkpoint, config = open_model(folder)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    if shut is not None:
        for layer in range(config.num_layers):
            rows = slice(FUSED + shut, FUSED + 18, 3)
            weights[f"layers.{layer}.qkv.weight"][rows] = 0
            weights[f"layers.{layer}.qkv.bias"][rows] = -1e4
    if num_selected is not None and config.nsa is not None:
        shape = replace(config.nsa.shape, num_selected=num_selected)
        config = replace(config, nsa=replace(config.nsa, shape=shape))
    return Decoder(config, weights)


def logits(model: Decoder) -> Tensor:
    return PagedModel(model, [len(IDS)]).prefill(IDS.tolist(), sizes=(64,))


@pytest.mark.parametrize("ablation", BRANCHES)
def test_a_shut_gate_is_a_gate_whose_weights_keep_it_shut(folder: Path, ablation: Ablation) -> None:
    model = decoder(folder)
    whole = logits(model)
    ablate(model, ablation)
    found = logits(model)
    torch.testing.assert_close(found, logits(decoder(folder, shut=BRANCHES.index(ablation))))
    assert not torch.allclose(found, whole, atol=1e-2)


def test_without_selection_only_forced_blocks_are_left(folder: Path) -> None:
    model = decoder(folder)
    whole = logits(model)
    ablate(model, Ablation.SELECTION)
    found = logits(model)
    torch.testing.assert_close(found, logits(decoder(folder, num_selected=3)))
    assert not torch.allclose(found[100:], whole[100:], atol=1e-2)


def test_what_a_model_does_not_have_can_not_be_taken_out(tmp_path: Path) -> None:
    ungated = decoder(write_checkpoint(tmp_path / "n", nsa_config_json(NSAConfig(TINY_NSA))))
    with pytest.raises(ConfigError, match="needs learned gates"):
        ablate(ungated, Ablation.SELECTED)
    dense = decoder(write_checkpoint(tmp_path / "d", TINY_LLAMA))
    with pytest.raises(ConfigError, match="use --attention nsa"):
        ablate(dense, Ablation.SELECTION)


def test_an_engine_is_loaded_without_the_part_and_says_so(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    nsa = nsa_to_json(NSAConfig(TINY_NSA, gated=True, gate_bias=True))
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "nsa_serve", "nsa": nsa})
    )
    flags = EngineConfig.from_flags(
        model=str(folder), random_weights=True, device="cpu", dtype="float32",
        kv_cache_memory_bytes=4 << 20, max_model_len=512,
    )  # fmt: skip
    whole = InProcess.load(flags)
    without = InProcess.load(flags, Ablation.WINDOW)
    assert {**whole.description, "ablation": "window"} == without.description
    window = list(range(100))
    found, expected = without.logprobs([window]), whole.logprobs([window])
    assert len(found[0]) == 99
    assert found != expected
