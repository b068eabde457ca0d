"""The whole engine on a GPU: the CPU's logits, the needles, and texts that nothing can change."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_serve import LLM, SamplingParams
from nsa_serve.config import ModelSource
from nsa_serve.models.checkpoint import resolve
from nsa_serve.tokenizer import Tokenizer, read_source
from tests.needle import NUM_TRIALS, needles
from tests.true_mass import TrueMassOps

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
CACHE = 2 << 30


@pytest.fixture(scope="module")
def encode():
    return Tokenizer(read_source(resolve(ModelSource()))).encode


def engine(**flags):
    return LLM(**{"device": "cuda", "kv_cache_memory_bytes": CACHE, **flags})


def random_prompts(count, longest, seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [[rng.randrange(100, 49_000) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("attention", ["dense", "nsa"])
def test_prompt_logprobs_are_the_cpus_within_bf16_rounding(attention, encode):
    prompts = [encode(needle.prompt) for needle in needles(1000, encode)][:2]
    prompts += [prompts[0][:1], prompts[0][:65], prompts[1][:511]]
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    ours = engine(attention=attention).generate(prompts, asked)
    cpu = LLM(device="cpu", dtype="float32", attention=attention, kv_cache_memory_bytes=1 << 29)
    theirs = cpu.generate(prompts, asked)
    for got, expected in zip(ours, theirs, strict=True):
        a = torch.tensor([entry.logprob for entry in got.prompt_logprobs[1:]])
        b = torch.tensor([entry.logprob for entry in expected.prompt_logprobs[1:]])
        if len(a):
            assert (a - b).abs().mean() < 0.05
            assert (a.mean() - b.mean()).abs() < 0.02


def num_found(llm, trials, encode):
    results = llm.generate([encode(needle.prompt) for needle in trials], GREEDY)
    return sum(n.found_in(r.text) for n, r in zip(trials, results, strict=True))


def test_at_2k_nsa_finds_within_one_of_what_dense_finds(encode):
    trials = list(needles(2000, encode))
    found = {mode: num_found(engine(attention=mode), trials, encode) for mode in ("dense", "nsa")}
    assert found["dense"] >= NUM_TRIALS - 1
    assert abs(found["nsa"] - found["dense"]) <= 1, found


def test_at_4k_blocks_chosen_by_their_true_mass_find_every_number(encode):
    llm = engine(attention="nsa", enforce_eager=True)
    for layer in llm._engine._runner.model.layers:
        layer.attention.ops = TrueMassOps(layer.attention.ops)
    trials = list(needles(4000, encode))
    assert num_found(llm, trials, encode) == NUM_TRIALS


@pytest.mark.parametrize("attention", ["dense", "nsa"])
def test_deterministic_texts_do_not_depend_on_the_batch_chunks_or_prefix_hits(attention):
    prompts = random_prompts(500, 1500, seed=random.randrange(1 << 30))
    asked = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    together = engine(attention=attention, deterministic=True)
    batched = [result.token_ids for result in together.generate(prompts, asked)]
    hits = [result.token_ids for result in together.generate(prompts[:50], asked)]
    assert hits == batched[:50]
    del together
    alone = engine(
        attention=attention, deterministic=True, max_num_batched_tokens=512, max_num_seqs=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    for prompt, expected in zip(prompts, batched, strict=True):
        (result,) = alone.generate([prompt], asked)
        assert result.token_ids == expected


def test_nsa_equals_dense_up_to_the_length_where_all_blocks_are_selected():
    prompts = random_prompts(6, 1000, seed=random.randrange(1 << 30))
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    sparse, dense = (
        engine(attention=mode, dtype="float32").generate(prompts, asked)
        for mode in ("nsa", "dense")
    )
    for a, b in zip(sparse, dense, strict=True):
        got, expected = (torch.tensor([e.logprob for e in r.prompt_logprobs[1:]]) for r in (a, b))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
