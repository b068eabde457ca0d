"""Tiny random checkpoints of every dense family equal transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa_serve.models.loader import load_decoder

from .checkpoints import CPU, TINY_LLAMA, open_model, save_transformers
from .model_steps import PagedModel
from .test_rope import FACTORS, LLAMA3, LONG_FACTORS

SIZES: dict[str, Any] = {k: v for k, v in TINY_LLAMA.items() if k != "model_type"}
LENGTH = 150
HALF = {"short_factor": FACTORS[:8], "long_factor": LONG_FACTORS[:8]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64, **HALF},
}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def qwen2(**changes: Any) -> PreTrainedModel:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes}))


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **changes}))


def assert_equal_to_transformers(folder: Path, model: PreTrainedModel) -> None:
    theirs = save_transformers(folder, model)
    checkpoint, config = open_model(folder)
    decoder = load_decoder(checkpoint, config, device=CPU, dtype=torch.float32)
    ids = torch.randint(3, SIZES["vocab_size"], (LENGTH,)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    paged = PagedModel(decoder, [LENGTH])
    found = paged.prefill(ids, sizes=(70, 79, 1))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 24},
    ],
    ids=str,
)
def test_llama_equals_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_equal_to_transformers(tmp_path, llama(**changes))


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_equals_transformers(tmp_path: Path, tied: bool) -> None:
    assert_equal_to_transformers(tmp_path, qwen2(tie_word_embeddings=tied))


@pytest.mark.parametrize("bias", [True, False])
def test_qwen3_equals_transformers(tmp_path: Path, bias: bool) -> None:
    assert_equal_to_transformers(tmp_path, qwen3(attention_bias=bias))


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_kind_equals_transformers(tmp_path: Path, kind: str) -> None:
    assert_equal_to_transformers(tmp_path, llama(rope_parameters=dict(ROPES[kind])))
