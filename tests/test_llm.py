"""Offline generation: the same engine in this process, prompts in, results out."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nsa_serve
from nsa_serve.config import AttentionMode, DType, EngineConfig, Policy
from nsa_serve.errors import ConfigError, InvalidParameter, PromptTooLong
from nsa_serve.llm import LLM
from nsa_serve.request import FinishReason, GrammarKind, GrammarSpec, SamplingParams
from tests.checkpoints import TINY_LLAMA, write_config

REGEX = GrammarSpec(GrammarKind.REGEX, r"Paris, [0-9]{5}")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The embedded model with NSA, and a queue shorter than the batches of these tests."""
    return LLM(
        attention="nsa",
        device="cpu",
        kv_cache_memory_bytes=32 << 20,
        max_num_seqs=4,
        max_num_queued_reqs=2,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> LLM:
    """Random weights and no tokenizer."""
    write_config(tmp_path, TINY_LLAMA)
    return LLM(str(tmp_path), random_weights=True, device="cpu", kv_cache_memory_bytes=4 << 20)


def test_the_embedded_model_knows_the_capital_of_france(llm: LLM) -> None:
    (result,) = llm.chat(QUESTION, GREEDY)
    assert "Paris" in result.text
    assert result.finish_reason is FinishReason.STOP
    assert result.usage.completion_tokens == len(result.token_ids)
    assert "capital of France" in llm.tokenizer.decode(result.prompt_token_ids)


def test_several_conversations_are_answered_in_their_order(llm: LLM) -> None:
    other = [{"role": "user", "content": "Say hello."}]
    hello, paris = llm.chat([other, QUESTION], GREEDY)
    assert "Say hello." in llm.tokenizer.decode(hello.prompt_token_ids)
    assert ("Paris" in hello.text, "Paris" in paris.text) == (False, True)


def test_results_come_in_the_order_of_the_prompts_however_many_the_queue_takes(llm: LLM) -> None:
    prompts: list[Any] = ["One", [504], "Three and", "Four", "Five", "Six", "Seven", "Eight"]
    settings = [
        SamplingParams(temperature=0.0, max_tokens=1 + i % 3, ignore_eos=True)
        for i in range(len(prompts))
    ]
    results = llm.generate(prompts, settings)
    assert [r.prompt for r in results] == [p if isinstance(p, str) else None for p in prompts]
    assert [len(r.token_ids) for r in results] == [1 + i % 3 for i in range(len(prompts))]
    assert all(r.text == llm.tokenizer.decode(r.token_ids) for r in results)


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    one = SamplingParams(temperature=0.0, max_tokens=1)
    assert [r.prompt for r in llm.generate("One", one)] == ["One"]
    assert [r.prompt_token_ids for r in llm.generate([504, 505], one)] == [[504, 505]]
    assert llm.generate([], one) == []


def test_logprobs_of_outputs_and_prompt_are_aligned_with_their_tokens(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    (result,) = llm.generate("The capital of France is", sampling)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert all(entry.rank == 1 and len(entry.top) == 2 for entry in result.logprobs)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    entries = [entry.token_id for entry in result.prompt_logprobs[1:] if entry is not None]
    assert entries == result.prompt_token_ids[1:]


def test_the_same_seed_gives_the_same_text(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=6, ignore_eos=True)
    first, second = llm.generate(["Once upon a time"] * 2, sampling)
    assert first.token_ids == second.token_ids


def test_a_prompt_that_can_not_run_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(PromptTooLong):
        llm.generate(["fine", [5] * 9000], GREEDY)
    with pytest.raises(InvalidParameter, match="2 sampling settings for 1 prompts"):
        llm.generate("fine", [GREEDY, GREEDY])
    stats = llm._engine.stats()
    assert stats.num_running + stats.num_waiting + stats.num_blocks_in_use == 0


def test_ctrl_c_leaves_an_engine_that_can_go_on(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, turns = tiny._engine.step, iter(range(100))

    def interrupted(now: float) -> Any:
        if next(turns) == 3:
            raise KeyboardInterrupt
        return step(now)

    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    monkeypatch.setattr(tiny._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate([[5], [6]], sampling)
    assert tiny._engine.stats().num_blocks_in_use == 0
    assert len(tiny.generate([5], sampling)[0].token_ids) == 8


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tiny: LLM) -> None:
    (result,) = tiny.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True), progress=True)
    assert (result.text, len(result.token_ids)) == ("", 4)
    with pytest.raises(InvalidParameter, match="this model has no tokenizer"):
        tiny.generate("text")


def test_public_names_are_there_without_loading_torch_for_the_light_ones() -> None:
    assert nsa_serve.LLM is LLM
    assert nsa_serve.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="nonsense"):
        _ = nsa_serve.nonsense
    code = "from nsa_serve import SamplingParams; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_offline_nobody_waits_for_single_tokens_unless_it_is_said(tiny: LLM) -> None:
    assert not tiny.config.schedule.interactive
    told = LLM(
        tiny.config.source.model, random_weights=True, device="cpu", interactive=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    assert told.config.schedule.interactive
    assert told.config.for_throughput() == tiny.config


def test_flat_flags_become_the_nested_configuration() -> None:
    config = EngineConfig.from_flags(
        model="m",
        dtype="float32",
        attention="nsa",
        scheduling_policy="priority",
        max_num_seqs=3,
        gpu_memory_utilization=1,
        max_model_len=None,
        device="cpu",
    )
    assert config.source.dtype is DType.FLOAT32
    assert config.source.attention is AttentionMode.NSA
    assert config.schedule.policy is Policy.PRIORITY
    assert (config.schedule.max_num_seqs, config.cache.gpu_memory_utilization) == (3, 1.0)
    assert (config.source.model, config.source.max_model_len, config.device) == ("m", None, "cpu")
    assert EngineConfig.from_flags() == EngineConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_sequences": 3}, "unknown setting 'max_num_sequences'"),
        ({"schedule": None}, "unknown setting 'schedule'"),
        ({"policy": "fcfs"}, "unknown setting 'policy'"),
        ({"max_num_seqs": "3"}, "--max-num-seqs '3'"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be 1 to 4096"),
        ({"dtype": "int4"}, "--dtype is one of auto, bfloat16, float16, float32, not 'int4'"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_a_flag_that_can_not_work_is_refused_by_its_name(flags: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_flags(**flags)


def test_a_grammar_shapes_one_prompt_of_several(llm: LLM) -> None:
    number = SamplingParams(temperature=0.0, max_tokens=12, grammar=REGEX)
    bad = SamplingParams(grammar=GrammarSpec(GrammarKind.GRAMMAR, "start: foo"))
    alone = llm.chat(QUESTION, number)[0].text
    shaped, plain, failed = llm.chat([QUESTION] * 3, [number, GREEDY, bad])
    assert re.fullmatch(REGEX.text, shaped.text)
    assert shaped.text == alone
    assert "Paris" in plain.text
    assert failed.finish_reason is FinishReason.ERROR
    assert "unknown name" in (failed.error or "")


def test_a_model_without_a_tokenizer_follows_no_grammar(tiny: LLM) -> None:
    with pytest.raises(InvalidParameter, match="takes a model with a tokenizer"):
        tiny.generate([[1, 2, 3]], SamplingParams(grammar=REGEX))
