"""Steps and endings: who is in a step with how many tokens, and when a request has ended."""

import pytest

from nsa_serve.request import FinishReason

from .fake_runner import DEPTHS, EOS, Harness, next_token, outputs_alone, past_of


def first_token(prompt, seed=7):
    return next_token(past_of(prompt), seed)


@DEPTHS
def test_one_request_gives_its_tokens_and_ends_by_length(depth):
    house = Harness(depth=depth)
    house.add("a", [1, 2, 3, 4, 5], seed=7, max_tokens=9, ignore_eos=True)
    house.drain()
    assert house.outputs["a"] == outputs_alone([1, 2, 3, 4, 5], max_tokens=9, ignore_eos=True)
    assert house.reason("a") is FinishReason.LENGTH
    # The last token's K/V are never needed, so no step computes them.
    assert house.runner.num_computed_tokens == 5 + 8


@DEPTHS
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 100])
def test_a_prompt_in_chunks_of_any_size_gives_the_same(depth, budget):
    house = Harness(depth=depth, budget=budget)
    house.add("a", list(range(1, 24)), seed=7, max_tokens=6)
    house.drain()
    assert house.outputs["a"] == outputs_alone(list(range(1, 24)), max_tokens=6)


def test_a_prefill_chunk_and_decodes_share_a_step():
    house = Harness(budget=8)
    house.add("a", [1, 2, 3], seed=7, max_tokens=20, ignore_eos=True)
    house.step()
    house.add("b", list(range(1, 21)), seed=7, max_tokens=2, ignore_eos=True)
    plan = house.step()
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [("a", 1), ("b", 2)]


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one():
    house = Harness(budget=8, num_blocks=128)
    house.add("long", list(range(1, 200)), max_tokens=2)
    assert house.step().num_tokens == 8
    house.add("short", [9, 9], max_tokens=2)
    plan = house.step()
    assert {c.request_id: c.num_tokens for c in plan.chunks} == {"long": 2, "short": 2}


def test_a_stream_of_short_prompts_does_not_starve_a_long_one():
    house = Harness(budget=8, num_blocks=128)
    house.add("long", list(range(1, 42)), max_tokens=1)
    for i in range(30):
        for half in "ab":
            house.add(f"short{i}{half}", [i + 1] * 4, max_tokens=1)
        if not house.is_ended("long"):
            house.step()
    assert house.is_ended("long")
    house.drain()


def test_the_token_budget_bounds_decodes_too():
    house = Harness(budget=4, max_num_seqs=8)
    for i in range(8):
        house.add(f"r{i}", [i + 1, 2], seed=7, max_tokens=3, ignore_eos=True)
    house.drain()
    assert max(plan.num_tokens for plan in house.runner.plans) <= 4
    assert house.outputs["r7"] == outputs_alone([8, 2], max_tokens=3, ignore_eos=True)


def test_no_more_requests_run_than_there_are_rows():
    house = Harness(max_num_seqs=2)
    for i in range(5):
        house.add(f"r{i}", [i + 1, 2], max_tokens=4, ignore_eos=True)
    house.step()
    assert (house.scheduler.num_running, house.scheduler.num_waiting) == (2, 3)
    house.drain()
    assert all(map(house.is_ended, house.outputs))


def test_an_ended_request_leaves_its_row_to_the_next():
    house = Harness(max_num_seqs=1)
    house.add("a", [1, 2], max_tokens=1)
    house.add("b", [3, 4], max_tokens=1)
    house.step()
    plan = house.step()
    assert plan.freed_rows == [0]
    assert [(start.row, start.request_id) for start in plan.started] == [(0, "b")]


@DEPTHS
def test_an_eos_ends_a_request_and_the_extra_token_is_dropped(depth):
    prompt = next([i, 1] for i in range(1, 999) if first_token([i, 1]) == EOS)
    house = Harness(depth=depth)
    house.add("a", prompt, seed=7, max_tokens=50)
    house.drain()
    assert house.outputs["a"] == [EOS]
    assert house.reason("a") is FinishReason.STOP
    assert house.updates["a"][-1].stop_token_id is None
    assert len(house.runner.plans) == 1 + depth


@DEPTHS
def test_a_stop_token_ends_a_request_and_is_named(depth):
    house = Harness(depth=depth)
    stop = first_token([1, 2])
    house.add("a", [1, 2], seed=7, max_tokens=50, stop_token_ids=(stop,))
    house.drain()
    assert house.outputs["a"] == [stop]
    assert house.updates["a"][-1].stop_token_id == stop


def test_ignore_eos_goes_on_past_it():
    prompt = next([i, 1] for i in range(1, 999) if first_token([i, 1]) == EOS)
    house = Harness()
    house.add("a", prompt, seed=7, max_tokens=5, ignore_eos=True)
    house.drain()
    assert len(house.outputs["a"]) == 5


def test_stops_before_min_tokens_are_ignored():
    house = Harness()
    stop = first_token([1, 2])
    house.add("a", [1, 2], seed=7, max_tokens=5, min_tokens=1, stop_token_ids=(stop,))
    house.drain()
    assert len(house.outputs["a"]) > 1


@DEPTHS
def test_a_stop_string_found_outside_ends_the_request_once(depth):
    house = Harness(depth=depth)
    house.add("a", [1, 2], max_tokens=50, ignore_eos=True)
    house.step()
    house.step()
    ended = house.scheduler.finish("a", FinishReason.STOP, house.now)
    assert ended.finish_reason is FinishReason.STOP
    assert house.scheduler.finish("a", FinishReason.STOP, house.now) is None
    before = list(house.outputs["a"])
    house.drain()
    assert house.outputs["a"] == before


@DEPTHS
def test_an_abort_frees_everything_in_each_state(depth):
    house = Harness(depth=depth, max_num_seqs=1)
    house.add("running", [1, 2], max_tokens=50, ignore_eos=True)
    house.add("waiting", [3, 4], max_tokens=50, ignore_eos=True)
    house.step()
    for name in ("waiting", "running"):
        assert house.scheduler.abort(name, house.now).finish_reason is FinishReason.ABORT
        house.scheduler.check()
    assert house.scheduler.abort("running", house.now) is None
    assert house.scheduler.abort("unknown", house.now) is None
    house.drain()
    assert house.scheduler.stats.num_finished[FinishReason.ABORT] == 2


def test_an_id_can_be_used_again_while_the_old_step_is_in_flight():
    house = Harness(depth=1)
    house.add("a", [1, 2, 3, 4, 5], seed=7, max_tokens=5, ignore_eos=True)
    house.step()
    house.scheduler.abort("a", house.now)
    house.add("a", [9, 8], seed=7, max_tokens=5, ignore_eos=True)
    house.drain()
    assert house.outputs["a"] == outputs_alone([9, 8], max_tokens=5, ignore_eos=True)


def test_the_snapshot_tells_how_far_the_prompts_that_run_are_and_the_oldest_of_them():
    house = Harness(budget=8, num_blocks=128)

    def told():
        snapshot = house.scheduler.snapshot()
        return snapshot.num_queued_tokens, snapshot.num_prefill_tokens, snapshot.oldest_prefill

    house.add("long", list(range(1, 41)), max_tokens=1)
    assert told() == (40, 0, 0.0)
    house.launch()
    assert told() == (0, 32, 0.2)
    house.apply()
    house.add("other", list(range(100, 140)), max_tokens=1)
    house.launch()
    queued, left, share = told()
    assert (queued, left) == (0, 32 + 40 - 8)
    assert 0.2 < share < 0.4
    house.apply()
    house.drain()
    assert told() == (0, 0, 0.0)


def test_tokens_on_the_device_are_scheduled_before_they_are_known():
    house = Harness(depth=1)
    house.add("a", [1, 2, 3], seed=7, max_tokens=3, ignore_eos=True)
    first, second = house.launch(), house.launch()
    assert (first.chunks[0].token_ids, first.chunks[0].samples) == ([1, 2, 3], True)
    chunk = second.chunks[0]
    assert (chunk.start, chunk.num_tokens, chunk.token_ids, chunk.samples) == (3, 1, [], True)
    house.apply()
    house.drain()


def test_a_step_more_than_the_depth_is_our_mistake():
    house = Harness(depth=0)
    house.add("a", [1, 2, 3], max_tokens=3)
    house.launch()
    with pytest.raises(AssertionError, match="apply a step"):
        house.launch()


def test_counters_tell_what_happened():
    house = Harness(page_size=4)
    house.add("a", [1, 2, 3], max_tokens=4, ignore_eos=True)
    house.step()
    running = house.scheduler.snapshot()
    assert (running.num_running, running.num_waiting) == (1, 0)
    assert running.cache_usage == 1 / 64
    house.drain()
    done = house.scheduler.snapshot()
    assert (done.prompt_tokens, done.generation_tokens) == (3, 4)
    assert done.num_finished["length"] == 1
    assert (done.num_steps, done.iteration_tokens) == (4, 6)
    assert sum(done.iteration_buckets) == 4
