"""The embedded model equals transformers' LlamaForCausalLM on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from nsa_serve.config import AttentionMode, ModelSource
from nsa_serve.models.checkpoint import resolve
from nsa_serve.models.config import with_attention
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.families import model_config
from nsa_serve.models.loader import load_weights

from .checkpoints import CPU, embedded_llama
from .model_steps import PagedModel

LENGTHS = (1, 2, 65, 700, 2000)


@pytest.fixture(scope="module")
def checkpoint():
    return resolve(ModelSource())


@pytest.fixture(scope="module")
def theirs(checkpoint) -> LlamaForCausalLM:
    return embedded_llama(checkpoint)


@pytest.fixture(scope="module")
def decoders(checkpoint) -> dict[AttentionMode, Decoder]:
    """Dense and NSA, over the same fp32 weights."""
    config = model_config(checkpoint)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    modes = (AttentionMode.DENSE, AttentionMode.NSA)
    return {mode: Decoder(with_attention(config, mode), dict(weights)) for mode in modes}


def prompt_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 49152, (length,), generator=generator).tolist()


def test_dense_logits_equal_transformers_for_prompts_of_1_to_2000_tokens(theirs, decoders) -> None:
    ids = prompt_ids(max(LENGTHS), seed=1)
    with torch.inference_mode():
        # Causal: the first tokens' logits are those of the shorter prompts.
        hidden = theirs.model(torch.tensor([ids])).last_hidden_state[0]
    for length in LENGTHS:
        model = PagedModel(decoders[AttentionMode.DENSE], [length])
        found = model.step([(0, 0, ids[:length])])
        rows = torch.arange(length - 1, -1, -max(1, length // 50))
        with torch.inference_mode():
            expected = theirs.lm_head(hidden[rows])
        difference = (model.decoder.logits(found[rows]) - expected).abs().max()
        assert difference < 1e-3, f"{difference} at {length} tokens"


def test_64_greedy_tokens_of_20_prompts_equal_transformers(theirs, decoders) -> None:
    prompts = [prompt_ids(3 + 2 * i, seed=i) for i in range(20)]
    model = PagedModel(decoders[AttentionMode.DENSE], [len(ids) + 64 for ids in prompts])
    outputs = model.greedy(prompts, 64)
    # Their greedy continuation is ours if each of our tokens is their argmax after those before.
    longest = max(map(len, prompts)) + 64
    rows = [ids + out for ids, out in zip(prompts, outputs, strict=True)]
    padded = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        hidden = theirs.model(padded).last_hidden_state
        for row, ids, output in zip(hidden, prompts, outputs, strict=True):
            start = len(ids) - 1
            assert theirs.lm_head(row[start : start + 64]).argmax(1).tolist() == output


def test_nsa_with_fixed_gates_equals_dense_up_to_1024_tokens_and_not_beyond(decoders) -> None:
    ids = prompt_ids(1200, seed=3)
    rows = torch.tensor([0, 31, 500, 1000, 1023, 1199])
    logits = []
    for decoder in decoders.values():
        model = PagedModel(decoder, [len(ids)])
        hidden = [model.step([(0, 0, ids[:1000])]), model.step([(0, 1000, ids[1000:])])]
        logits.append(decoder.logits(torch.cat(hidden)[rows]))
    difference = (logits[0] - logits[1]).abs().amax(1)
    assert difference[:-1].max() < 1e-4
    assert difference[-1] > 1e-2


def test_bf16_weights_give_the_logits_of_fp32_within_rounding(checkpoint, decoders) -> None:
    config = model_config(checkpoint)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.bfloat16)
    ids = prompt_ids(60, seed=4)
    expected = PagedModel(decoders[AttentionMode.DENSE], [60]).prefill(ids)
    found = PagedModel(Decoder(config, weights), [60]).prefill(ids, sizes=(59, 1))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.05, error.max()


def test_the_served_context_is_the_checkpoints(checkpoint) -> None:
    config = model_config(checkpoint)
    assert (config.max_position, config.eos_token_ids, config.bos_token_id) == (8192, (2,), 1)
    assert replace(config, nsa=None) == with_attention(config, AttentionMode.AUTO)
