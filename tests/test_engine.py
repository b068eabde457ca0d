"""The engine: one final output for every accepted request, whatever fails, and clean books."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.config import ModelSource
from nsa_serve.engine import engine as engine_module
from nsa_serve.errors import InvalidParameter, Overloaded, PromptTooLong
from nsa_serve.models.checkpoint import resolve
from nsa_serve.request import FinishReason
from nsa_serve.runner.model_runner import NO_FINITE_LOGITS
from nsa_serve.tokenizer import Tokenizer, read_source
from tests.fake_runner import DEPTHS
from tests.scripted_engine import EOS, VOCAB, Bench, make_request


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(read_source(resolve(ModelSource())))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Failures are caused on purpose here; their traces would fill the report."""
    logging.getLogger(engine_module.__name__).disabled = True
    yield
    logging.getLogger(engine_module.__name__).disabled = False


@DEPTHS
def test_a_request_gives_its_tokens_one_a_step_and_one_final_output(depth: int) -> None:
    bench = Bench({"a": range(10, 40)}, depth=depth)
    bench.add("a", max_tokens=5)
    bench.drain()
    assert bench.token_ids("a") == [10, 11, 12, 13, 14]
    assert [len(o.token_ids) for o in bench.outputs["a"]] == [1] * 5
    assert bench.final("a").finish_reason is FinishReason.LENGTH
    assert bench.final("a").usage.completion_tokens == 5


@DEPTHS
def test_the_end_token_stops_and_is_counted(depth: int) -> None:
    bench = Bench({"a": [10, EOS, 12], "b": [10, EOS, 12]}, depth=depth)
    bench.add("a")
    bench.add("b", ignore_eos=True, max_tokens=3)
    bench.drain()
    assert bench.token_ids("a") == [10, EOS]
    assert bench.final("a").finish_reason is FinishReason.STOP
    assert bench.final("a").stop_reason is None
    assert bench.token_ids("b") == [10, EOS, 12]


@DEPTHS
def test_a_stop_string_over_two_tokens_ends_the_request(tokenizer: Tokenizer, depth: int) -> None:
    script = tokenizer.encode("The answer is 42.\n\nUser: more")
    bench = Bench({"a": script}, tokenizer, depth=depth)
    bench.add("a", stop=(".\n\nUser",), max_tokens=40)
    bench.drain()
    assert bench.text("a") == "The answer is 42"
    assert bench.final("a").finish_reason is FinishReason.STOP
    assert bench.final("a").stop_reason == ".\n\nUser"
    assert bench.final("a").usage.completion_tokens < len(script)


def test_a_stop_token_is_named_in_the_final_output() -> None:
    bench = Bench({"a": [10, 11, 12]})
    bench.add("a", stop_token_ids=(11,))
    bench.drain()
    assert bench.final("a").stop_reason == 11


@DEPTHS
def test_requests_in_one_batch_keep_their_outputs_apart(depth: int) -> None:
    names = [f"r{i}" for i in range(12)]
    bench = Bench({name: [100 + i, 200 + i] for i, name in enumerate(names)}, depth=depth)
    for i, name in enumerate(names):
        bench.add(name, range(5, 6 + i), max_tokens=2 + i % 3)
    bench.drain()
    for i, name in enumerate(names):
        assert bench.token_ids(name) == ([100 + i, 200 + i] * 2)[: 2 + i % 3]


def test_logprobs_prompt_logprobs_and_cached_tokens_come_with_the_outputs() -> None:
    prompt = range(5, 25)
    bench = Bench({"a": [9], "prompt-logprobs": [9]}, token_budget=16)
    bench.add("a", prompt, logprobs=0, max_tokens=2)
    bench.drain()
    bench.add("prompt-logprobs", prompt, prompt_logprobs=0, max_tokens=1)
    bench.drain()
    assert [entry.token_id for o in bench.outputs["a"] for entry in o.logprobs] == [9, 9]
    entries = bench.final("prompt-logprobs").prompt_logprobs
    assert entries[0] is None
    assert [entry.logprob for entry in entries[1:]] == [-float(i) for i in range(1, 20)]


def test_a_prompt_seen_before_is_counted_as_cached() -> None:
    bench = Bench({"a": [9], "b": [9]})
    for name in ("a", "b"):
        bench.add(name, range(5, 18), max_tokens=1)
        bench.drain()
    assert bench.final("a").usage.cached_tokens == 0
    assert bench.final("b").usage.cached_tokens == 12


def test_times_are_the_clocks_when_it_happened() -> None:
    bench = Bench({"a": [9]}, token_budget=8)
    bench.clock.now = 100.0
    bench.add("a", range(5, 17), max_tokens=3)
    bench.drain()
    times = bench.final("a").times
    assert (times.arrival, times.first_scheduled) == (100.0, 101.0)
    assert (times.first_token, times.last_token) == (102.0, 104.0)


@DEPTHS
def test_void_logits_end_their_request_and_nobody_elses(depth: int) -> None:
    bench = Bench({"a": [9], "b": [9]}, depth=depth)
    bench.add("a")
    bench.add("b")
    bench.runner.void.add("a")
    bench.drain()
    assert bench.final("a").finish_reason is FinishReason.ERROR
    assert bench.final("a").error == NO_FINITE_LOGITS
    assert bench.final("b").finish_reason is FinishReason.LENGTH


@DEPTHS
@pytest.mark.parametrize("where", ["launch_errors", "result_errors"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_step_that_raises_ends_its_requests_and_the_engine_lives(
    depth: int, where: str, step: int
) -> None:
    bench = Bench({"a": [9], "b": [9], "c": [9], "d": [9]}, depth=depth, token_budget=16)
    getattr(bench.runner, where)[step] = RuntimeError("out of memory, say")
    bench.add("a", max_tokens=20)
    bench.add("b", range(5, 90), max_tokens=20)  # some steps compute of it without sampling
    bench.drain()
    failed = [n for n in ("a", "b") if bench.final(n).finish_reason is FinishReason.ERROR]
    assert failed
    assert all("failed" in (bench.final(name).error or "") for name in failed)
    assert not any("memory" in (bench.final(name).error or "") for name in failed)
    bench.add("c", max_tokens=2)
    bench.drain()
    assert bench.final("c").finish_reason is FinishReason.LENGTH
    assert bench.token_ids("c") == [9, 9]


@DEPTHS
def test_pages_of_a_failed_step_are_never_shared(depth: int) -> None:
    bench = Bench({"a": [9], "b": [9]}, depth=depth, token_budget=16)
    bench.runner.launch_errors[0] = RuntimeError
    bench.add("a", range(5, 45))
    bench.drain()
    bench.add("b", range(5, 45), max_tokens=1)
    bench.drain()
    assert bench.final("b").usage.cached_tokens == 0


def test_a_failed_step_spares_a_new_request_of_the_same_id() -> None:
    bench = Bench({"a": [9], "b": [9]}, depth=1)
    bench.runner.result_errors[0] = RuntimeError("late")
    bench.add("a", range(5, 45))  # its first chunk samples nothing
    bench.step()
    bench.abort("a")
    first = bench.outputs.pop("a")
    bench.add("a", range(50, 60), max_tokens=2)
    bench.drain()
    assert first[-1].finish_reason is FinishReason.ABORT
    assert bench.final("a").finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("where", ["launch_errors", "result_errors"])
def test_a_lost_device_ends_the_engine(where: str) -> None:
    bench = Bench({"a": [9]})
    getattr(bench.runner, where)[0] = torch.AcceleratorError("illegal address")
    bench.add("a")
    with pytest.raises(torch.AcceleratorError):
        bench.drain()


@pytest.mark.parametrize("where", ["launch_errors", "result_errors"])
def test_an_interrupted_step_leaves_an_engine_that_can_go_on(where: str) -> None:
    bench = Bench({"a": [9], "b": [9]})
    getattr(bench.runner, where)[0] = KeyboardInterrupt()
    bench.add("a")
    with pytest.raises(KeyboardInterrupt):
        bench.step()
    bench.add("b", max_tokens=1)
    bench.drain()
    assert bench.final("a").finish_reason is FinishReason.ERROR
    assert bench.final("b").finish_reason is FinishReason.LENGTH


def test_text_that_can_not_be_made_ends_its_request_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tokenizer.encode("some words here")
    bench = Bench({"a": script, "b": script}, tokenizer)
    bench.add("a")
    bench.add("b", max_tokens=3)

    def broken(token_ids: list[int]) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(bench.engine._live["a"].output._decoder, "feed", broken)
    bench.drain()
    assert bench.final("a").finish_reason is FinishReason.ERROR
    assert bench.text("b") == "some words here"


@DEPTHS
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_abort_at_any_time_gives_one_final_output(depth: int, steps: int) -> None:
    bench = Bench({"a": [9], "b": [9]}, depth=depth, token_budget=8)
    bench.add("a", range(5, 20), max_tokens=30)
    bench.add("b", range(5, 20), max_tokens=4)
    for _ in range(steps):
        bench.step()
    bench.abort("a")
    bench.abort("a")
    assert bench.final("a").finish_reason is FinishReason.ABORT
    bench.drain()
    assert bench.final("b").finish_reason is FinishReason.LENGTH


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 3.0}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"seed": 1 << 63}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: 101.0}}, "logit_bias"),
]


@pytest.mark.parametrize(("sampling", "param"), BAD)
def test_sampling_that_means_nothing_is_refused_by_its_name(
    sampling: dict[str, Any], param: str
) -> None:
    bench = Bench({})
    with pytest.raises(InvalidParameter, match=param) as caught:
        bench.add("a", **sampling)
    assert caught.value.param == param
    assert not bench.engine.has_work
    assert bench.engine.stats().num_rejected == 1


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused_at_the_door(token_id: int) -> None:
    with pytest.raises(InvalidParameter, match="prompt must be token ids"):
        Bench({}).add("a", [5, token_id])


def test_the_queue_is_bounded_and_a_prompt_must_fit() -> None:
    bench = Bench({"a": [9], "b": [9]}, max_num_queued_reqs=1)
    bench.add("a")
    with pytest.raises(Overloaded) as caught:
        bench.engine.add(make_request("b"), 0.0)
    assert caught.value.retry_after >= 1
    with pytest.raises(PromptTooLong, match="128 tokens"):
        bench.engine.add(make_request("c", range(5, 133)), 0.0)
    bench.drain()
    assert bench.engine.stats().num_rejected == 2


def test_stats_count_what_happened() -> None:
    bench = Bench({"a": [9], "b": [9]})
    bench.add("a", max_tokens=3)
    bench.add("b", max_tokens=4)
    assert bench.engine.stats().num_waiting == 2
    bench.step()
    assert bench.engine.stats().num_running == 2
    bench.drain()
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_in_use) == (0, 0, 0)
    assert stats.generation_tokens == 7
    assert stats.num_finished["length"] == 2


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "step", "step", "step", "abort", "void", "fail", "break"]),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(operations=OPERATIONS, depth=st.sampled_from([0, 1]), num_blocks=st.sampled_from([20, 64]))
def test_whatever_happens_every_request_ends_once_and_nothing_leaks(
    operations: list[tuple[str, int]], depth: int, num_blocks: int
) -> None:
    names = [f"r{i}" for i in range(len(operations))]
    scripts = {name: [7 + i, 8, EOS if i % 5 == 0 else 9] for i, name in enumerate(names)}
    bench = Bench(scripts, depth=depth, num_blocks=num_blocks, token_budget=8)
    for name, (operation, number) in zip(names, operations, strict=True):
        known = list(bench.outputs)
        match operation:
            case "add":
                bench.add(name, range(5, 6 + number), max_tokens=1 + number % 7)
            case "abort" if known:
                bench.abort(known[number % len(known)])
            case "void" if known:
                bench.runner.void.add(known[number % len(known)])
            case "fail":
                bench.runner.launch_errors[len(bench.runner.plans)] = RuntimeError("launch")
            case "break":
                bench.runner.result_errors[len(bench.runner.plans)] = RuntimeError("result")
            case _:
                bench.step()
        bench.engine.check()
    bench.drain()
    for name, outputs in bench.outputs.items():
        final = outputs[-1]
        assert final.usage is not None
        assert final.usage.completion_tokens == len(bench.token_ids(name))
        assert (final.error is None) == (final.finish_reason is not FinishReason.ERROR)
