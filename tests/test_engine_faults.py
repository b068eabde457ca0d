"""Faults inside a step: too little memory, void logits, aborts in the midst of it."""

import logging
from collections.abc import Iterator

import pytest
import torch

from nsa_serve.engine import engine as engine_module
from nsa_serve.engine.engine import OUT_OF_MEMORY, is_out_of_memory
from nsa_serve.request import FinishReason
from nsa_serve.runner.model_runner import NO_FINITE_LOGITS
from tests.fake_runner import DEPTHS
from tests.scripted_engine import Bench

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Failures are caused on purpose here; their traces would fill the report."""
    logging.getLogger(engine_module.__name__).disabled = True
    yield
    logging.getLogger(engine_module.__name__).disabled = False


def crowded(depth: int, **options: int) -> Bench:
    """Four requests, added in the order of their names; each has its own script."""
    scripts = {name: [10 * i + j for j in range(10)] for i, name in enumerate(NAMES, start=1)}
    bench = Bench(scripts, depth=depth, **options)
    for i, name in enumerate(NAMES):
        # Prompts that share a page would wait for each other.
        bench.add(name, range(20 * i + 5, 20 * i + 15), max_tokens=8, ignore_eos=True)
    return bench


def failed(bench: Bench) -> list[str]:
    return [name for name in NAMES if bench.final(name).finish_reason is FinishReason.ERROR]


@DEPTHS
@pytest.mark.parametrize("step", [0, 1, 2, 4, 7])
def test_a_step_without_memory_ends_its_newest_request_and_the_others_lose_no_token(
    depth: int, step: int
) -> None:
    bench = crowded(depth, token_budget=64)
    bench.runner.launch_errors[step] = torch.OutOfMemoryError("CUDA out of memory")
    bench.drain()
    assert failed(bench) == ["d"]
    assert bench.final("d").error == OUT_OF_MEMORY
    for name in ("a", "b", "c"):
        assert bench.token_ids(name) == list(bench.runner.scripts[name])[:8]


@DEPTHS
def test_each_step_in_a_row_without_memory_ends_twice_as_many(depth: int) -> None:
    bench = crowded(depth, token_budget=64)
    for step in (2, 3):
        bench.runner.launch_errors[step] = MemoryError()
    bench.drain()
    assert failed(bench) == ["b", "c", "d"]
    assert bench.token_ids("a") == list(range(10, 18))


@DEPTHS
def test_memory_that_never_suffices_ends_everything_and_the_engine_lives(depth: int) -> None:
    bench = crowded(depth, token_budget=16)
    for step in range(50):
        bench.runner.launch_errors[step] = torch.OutOfMemoryError("CUDA out of memory")
    bench.drain(max_steps=50)
    assert failed(bench) == list(NAMES)
    bench.runner.launch_errors.clear()
    bench.outputs.pop("a")
    bench.add("a", max_tokens=2)
    bench.drain()
    assert bench.token_ids("a") == [10, 11]


def test_a_mended_step_ends_one_request_again_next_time() -> None:
    bench = crowded(0, token_budget=64)
    for step in (1, 4):
        bench.runner.launch_errors[step] = torch.OutOfMemoryError("CUDA out of memory")
    bench.drain()
    assert failed(bench) == ["c", "d"]


def test_torch_on_a_cpu_says_in_words_that_memory_lacks() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@DEPTHS
def test_void_logits_are_counted(depth: int) -> None:
    bench = crowded(depth)
    bench.runner.void |= {"a", "c"}
    bench.drain()
    assert failed(bench) == ["a", "c"]
    assert bench.engine.stats().num_void_logits == 2


@pytest.mark.parametrize("error", [RuntimeError("x"), torch.OutOfMemoryError("x")])
def test_a_step_that_failed_counts_no_void_logits(error: Exception) -> None:
    bench = crowded(0)
    bench.runner.launch_errors[2] = error
    bench.drain()
    assert bench.engine.stats().num_void_logits == 0


def test_the_scripted_runner_says_what_the_real_one_says_of_void_logits() -> None:
    bench = crowded(0)
    bench.runner.void.add("b")
    bench.drain()
    assert bench.final("b").error == NO_FINITE_LOGITS


@DEPTHS
@pytest.mark.parametrize("num_steps", [1, 2, 5], ids=lambda n: f"after-{n}-steps")
def test_pages_of_an_aborted_request_are_free_within_a_step(depth: int, num_steps: int) -> None:
    """One step into a prompt of five steps, two steps into it, and while tokens come."""
    bench = Bench({"a": [9], "other": [8]}, depth=depth, token_budget=8, num_blocks=64)
    bench.add("a", range(5, 45), max_tokens=50)
    for _ in range(num_steps):
        bench.step()
    held = bench.cache.num_in_use
    assert held > 0
    bench.abort("a")
    if bench.engine.has_work:
        bench.step()
    assert bench.cache.num_in_use == 0
    assert bench.final("a").finish_reason is FinishReason.ABORT
