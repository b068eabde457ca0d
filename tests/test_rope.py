"""Rotary embedding: every scaling kind equals transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nsa_serve.errors import CheckpointError
from nsa_serve.models.config import RopeConfig
from nsa_serve.models.families.options import Options, read_rope
from nsa_serve.models.rope import build_rotary, inverse_frequencies

DIM = 32
CONTEXT = 2048
FACTORS = [1.0 + 0.25 * i for i in range(DIM // 2)]
LONG_FACTORS = [2.0 + 0.5 * i for i in range(DIM // 2)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"short_factor": FACTORS, "long_factor": LONG_FACTORS}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "original_max_position_embeddings": 512, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with options": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
    "yarn with its factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 512,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 512, **LONGROPE},
    "longrope with its factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 512,
        "attention_factor": 1.2,
        **LONGROPE,
    },
}


def ours(config: dict[str, Any]) -> tuple[RopeConfig, int]:
    return read_rope(Options(config, "config.json"), DIM)


def config_json(scaling: dict[str, Any] | None, **keys: Any) -> dict[str, Any]:
    config = {"max_position_embeddings": CONTEXT, "rope_theta": 50000.0, **keys}
    return config if scaling is None else config | {"rope_scaling": dict(scaling)}


def theirs(config: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(hidden_size=2 * DIM, num_attention_heads=2, head_dim=DIM, **config)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("max_len", [256, 2048, 4096])
def test_frequencies_and_factor_equal_transformers(name: str, max_len: int) -> None:
    config = config_json(SCALINGS[name])
    rope, _ = ours(config)
    inv_freq, scale = inverse_frequencies(rope, DIM, max_len)
    kind = SCALINGS[name]["rope_type"]
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs(config), None, seq_len=max_len)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(factor)


def test_unscaled_angles_equal_transformers() -> None:
    config = config_json(None)
    rope, context = ours(config)
    positions = torch.tensor([0, 1, 17, 2047])
    cos, sin = build_rotary(rope, DIM, context, torch.device("cpu"))(positions)
    module = LlamaRotaryEmbedding(theirs(config))
    expected_cos, expected_sin = module(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, expected_cos[0, :, : DIM // 2])
    torch.testing.assert_close(sin, expected_sin[0, :, : DIM // 2])


def test_the_factor_of_yarn_multiplies_cos_and_sin() -> None:
    rope, context = ours(config_json(SCALINGS["yarn with its factor"]))
    cos, sin = build_rotary(rope, DIM, context, torch.device("cpu"))(torch.tensor([5, 900]))
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.3**2))


def test_llama3_equals_the_factors_that_gguf_stores() -> None:
    rope, context = ours(config_json(SCALINGS["llama3"]))
    inv_freq, _ = inverse_frequencies(rope, DIM, context)
    plain, _ = inverse_frequencies(RopeConfig(theta=rope.theta), DIM, context)
    stored = RopeConfig(
        theta=rope.theta, kind="factors", options={"factors": (plain / inv_freq).tolist()}
    )
    torch.testing.assert_close(inverse_frequencies(stored, DIM, context)[0], inv_freq)


@pytest.mark.parametrize(
    ("scaling", "served"),
    [
        (SCALINGS["linear"], CONTEXT),
        (SCALINGS["dynamic"], 2 * CONTEXT),
        (SCALINGS["yarn"], CONTEXT),
        ({"rope_type": "yarn", "factor": 4.0}, 4 * CONTEXT),
        (SCALINGS["longrope"], CONTEXT),
    ],
)
def test_the_context_counts_the_stretch_once(scaling: dict[str, Any], served: int) -> None:
    assert ours(config_json(scaling))[1] == served


def test_old_and_new_spellings_mean_the_same() -> None:
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
    old = config_json({"type": "linear", "factor": 4.0})
    assert ours({"max_position_embeddings": CONTEXT, "rope_parameters": new}) == ours(old)
    su = config_json({**SCALINGS["longrope"], "rope_type": None, "type": "su"})
    assert ours(su) == ours(config_json(SCALINGS["longrope"]))


def test_a_part_of_the_head_may_be_rotated() -> None:
    rope, _ = ours(config_json(None, partial_rotary_factor=0.5))
    assert rope.rotary_dim == DIM // 2
    assert inverse_frequencies(rope, DIM, CONTEXT)[0].shape == (DIM // 4,)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "mrope"}, "'mrope'"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": FACTORS, "factor": 2.0}, "long_factor"),
        ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "16"),
    ],
)
def test_what_is_unknown_or_missing_is_named(scaling: dict[str, Any], words: str) -> None:
    rope, context = ours(config_json({**scaling, "original_max_position_embeddings": 512}))
    with pytest.raises(CheckpointError, match=words):
        inverse_frequencies(rope, DIM, context)
