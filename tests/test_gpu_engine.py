"""The whole engine on a GPU: the CPU's logits, the needles, and texts that nothing can change."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from nsa_serve import LLM, SamplingParams
from nsa_serve.config import ModelSource
from nsa_serve.models.checkpoint import resolve
from nsa_serve.request import JSON_OBJECT, GrammarKind, GrammarSpec
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


def prompt_logprobs(llm, prompts):
    """Log-probabilities of every prompt token but the first, all prompts in one row."""
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    results = llm.generate(prompts, asked)
    return torch.tensor([entry.logprob for r in results for entry in r.prompt_logprobs[1:]])


@pytest.mark.parametrize("attention", ["dense", "nsa"])
def test_prompt_logprobs_are_as_near_to_fp32_as_a_cpus_in_bf16(attention, encode):
    prompts = [encode(needle.prompt) for needle in needles(1000, encode)][:2]
    prompts += [prompts[0][:1], prompts[0][:65], prompts[1][:511]]
    found = {
        (device, dtype): prompt_logprobs(
            LLM(device=device, dtype=dtype, attention=attention, kv_cache_memory_bytes=1 << 29),
            prompts,
        )
        for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
    }
    exact = found["cpu", "float32"]
    ours = (found["cuda", "bfloat16"] - exact).abs().mean()
    cpus = (found["cpu", "bfloat16"] - exact).abs().mean()
    assert ours < 1.25 * cpus + 1e-3, (ours, cpus)


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
    asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
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
    sparse, dense = (
        prompt_logprobs(engine(attention=mode, dtype="float32"), prompts)
        for mode in ("nsa", "dense")
    )
    torch.testing.assert_close(sparse, dense, atol=2e-3, rtol=0)


GRAMMARS = [
    GrammarSpec(GrammarKind.REGEX, "[A-Z][a-z]{2,8}, [0-9]{4}"),
    GrammarSpec(GrammarKind.CHOICE, '["yes", "no"]'),
    JSON_OBJECT,
    None,
]


@pytest.mark.parametrize("deterministic", [False, True])
def test_grammars_hold_beside_free_requests_while_steps_are_launched_ahead(deterministic):
    llm = engine(attention="nsa", deterministic=deterministic)
    asked = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=40, grammar=grammar)
        for seed in range(6)
        for temperature in (0.0, 1.5)
        for grammar in GRAMMARS
    ]
    prompts = random_prompts(len(asked), 200, seed=random.randrange(1 << 30))
    results = llm.generate(prompts, asked)
    for number, result in enumerate(results):
        kind = number % len(GRAMMARS)
        if kind == 0:
            assert re.fullmatch(GRAMMARS[0].text, result.text)
        if kind == 1:
            assert result.text in ("yes", "no")
        if kind == 2:
            assert result.text.startswith("{")
            assert result.finish_reason == "length" or json.loads(result.text) is not None
        assert result.error is None
    if deterministic:
        alone = [llm.generate([p], [a])[0].token_ids for p, a in zip(prompts, asked, strict=True)]
        assert alone == [result.token_ids for result in results]
