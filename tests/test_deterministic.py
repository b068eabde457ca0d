"""``--deterministic`` on a CPU: a request's bytes depend on the request alone (invariant 4)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nsa_serve import LLM, SamplingParams
from nsa_serve.llm import RequestResult
from tests.checkpoints import PHIS, TINY_LLAMA, gated, nsa_config_json, write_checkpoint
from tests.fake_runner import NothingExpected

# Log-probabilities show a rounding that the chosen token would hide. A page is 16 tokens.
ASKED = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True, logprobs=2)


def engine(checkpoint: Path, dtype: str, **flags: Any) -> LLM:
    settings = {"kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 16, **flags}
    return LLM(
        str(checkpoint), random_weights=True, device="cpu", deterministic=True, dtype=dtype,
        **settings,
    )  # fmt: skip


def random_prompts(count: int, longest: int) -> list[list[int]]:
    """Random tokens; lengths from ``longest`` to 1 in equal steps.

    The longest come first, so that a cache which they fill has less room left than they grow by.
    """
    rng = random.Random()
    lengths = [longest - i * (longest - 1) // (count - 1) for i in range(count)]
    return [[rng.randrange(3, 96) for _ in range(length)] for length in lengths]


def bytes_of(results: list[RequestResult]) -> list[Any]:
    return [(result.token_ids, result.logprobs) for result in results]


# ``small`` is the bytes of a cache that the requests outgrow.
@pytest.mark.parametrize(
    ("config", "dtype", "small"),
    [
        (nsa_config_json(gated(PHIS["mean"])), "float32", 110 << 10),
        (nsa_config_json(gated(PHIS["linear"])), "bfloat16", 55 << 10),
        (TINY_LLAMA, "float32", 96 << 10),
    ],
    ids=["nsa", "nsa with products in φ", "dense"],
)
def test_bytes_do_not_depend_on_the_batch_chunks_prefix_hits_or_preemption(
    tmp_path: Path, config: dict[str, Any], dtype: str, small: int
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", config)
    prompts = random_prompts(12, 100)
    together = engine(checkpoint, dtype)
    batched = bytes_of(together.generate(prompts, ASKED))
    hits = together.generate(prompts, ASKED)
    assert any(result.usage.cached_tokens for result in hits)
    assert bytes_of(hits) == batched

    squeezed = engine(checkpoint, dtype, kv_cache_memory_bytes=small)
    squeezed._engine._scheduler._batcher._lengths = NothingExpected()
    assert bytes_of(squeezed.generate(prompts, ASKED)) == batched
    assert squeezed._engine.stats().num_preemptions > 0

    flags = {"max_num_batched_tokens": 17, "enable_prefix_caching": False}
    alone = engine(checkpoint, dtype, **flags)
    for prompt, expected in zip(prompts, batched, strict=True):
        assert bytes_of(alone.generate([prompt], ASKED)) == [expected]
