"""Claims about the scheduler, one each, over the fake runner and a fake clock."""

import pytest

from nsa_serve.config import Policy
from nsa_serve.errors import InvalidParameter, Overloaded, PromptTooLong
from nsa_serve.request import FinishReason, Request, RequestStatus, SamplingParams

from .fake_runner import EOS, Harness, make_request, next_token, past_of, run_alone

depths = pytest.mark.parametrize("depth", [0, 1])


def alone(request_id, prompt, seed=7, **sampling):
    return run_alone(make_request(request_id, prompt, **sampling), seed)


def first_token(prompt, seed=7):
    return next_token(past_of(prompt), seed)


@depths
def test_one_request_gives_its_tokens_and_ends_by_length(depth):
    house = Harness(depth=depth)
    house.add("a", [1, 2, 3, 4, 5], seed=7, max_tokens=9, ignore_eos=True)
    house.drain()
    assert house.outputs["a"] == alone("a", [1, 2, 3, 4, 5], max_tokens=9, ignore_eos=True)
    assert house.reason("a") is FinishReason.LENGTH
    # The last token's K/V are never needed, so no step computes them.
    assert house.runner.num_computed_tokens == 5 + 8


@depths
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 100])
def test_a_prompt_in_chunks_of_any_size_gives_the_same(depth, budget):
    house = Harness(depth=depth, budget=budget)
    house.add("a", list(range(1, 24)), seed=7, max_tokens=6)
    house.drain()
    assert house.outputs["a"] == alone("a", list(range(1, 24)), max_tokens=6)


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
    assert house.outputs["r7"] == alone("r7", [8, 2], max_tokens=3, ignore_eos=True)


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


def test_first_come_first_served():
    house = Harness(max_num_seqs=1)
    for name in "abc":
        house.add(name, [1, 2], max_tokens=1)
    house.drain()
    assert [start.request_id for p in house.runner.plans for start in p.started] == ["a", "b", "c"]


def test_lower_priority_values_run_first_then_arrival():
    house = Harness(max_num_seqs=1, policy=Policy.PRIORITY)
    for name, priority in [("late", 5), ("b", 1), ("first", -1), ("c", 1)]:
        house.add(name, [1, 2], max_tokens=1, priority=priority)
    house.drain()
    started = [start.request_id for p in house.runner.plans for start in p.started]
    assert started == ["first", "b", "c", "late"]


@depths
def test_an_eos_ends_a_request_and_the_extra_token_is_dropped(depth):
    prompt = next([i, 1] for i in range(1, 999) if first_token([i, 1]) == EOS)
    house = Harness(depth=depth)
    house.add("a", prompt, seed=7, max_tokens=50)
    house.drain()
    assert house.outputs["a"] == [EOS]
    assert house.reason("a") is FinishReason.STOP
    assert house.updates["a"][-1].stop_token_id is None
    assert len(house.runner.plans) == 1 + depth


@depths
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


@depths
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


@depths
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
    assert house.outputs["a"] == alone("a", [9, 8], max_tokens=5, ignore_eos=True)


def test_an_empty_prompt_a_taken_id_and_zero_tokens_are_refused():
    house = Harness()
    with pytest.raises(InvalidParameter, match="empty"):
        house.add("a", [])
    with pytest.raises(InvalidParameter, match="max_tokens"):
        house.add("a", [1], max_tokens=0)
    house.add("a", [1])
    with pytest.raises(InvalidParameter, match="'a' is running already"):
        house.add("a", [1])
    assert house.scheduler.stats.num_rejected == 3
    house.drain()


def test_more_than_the_context_is_refused_with_the_numbers():
    house = Harness(max_model_len=20)
    with pytest.raises(PromptTooLong, match=r"maximum context length is 20 tokens\. However") as e:
        house.add("a", [1] * 15, max_tokens=6)
    assert "21 tokens (15 in the prompt, 6 to generate)" in str(e.value)
    house.add("b", [1] * 15, max_tokens=5, ignore_eos=True)
    house.drain()
    assert len(house.outputs["b"]) == 5


def test_more_than_the_whole_cache_is_refused_and_exactly_all_of_it_runs():
    house = Harness(num_blocks=4, page_size=4)
    with pytest.raises(PromptTooLong, match="cache holds 16 tokens"):
        house.add("a", [1] * 10, max_tokens=8)
    house.add("b", [1] * 10, max_tokens=7, ignore_eos=True)
    house.drain()
    assert len(house.outputs["b"]) == 7


def test_a_full_queue_says_when_to_come_back():
    house = Harness(max_num_queued_reqs=2)
    house.add("a", [1])
    house.add("b", [1])
    with pytest.raises(Overloaded, match="2 requests wait") as e:
        house.add("c", [1])
    assert e.value.retry_after == 1
    house.step()
    house.add("c", [1])
    house.drain()


def test_a_queue_full_of_tokens_refuses_but_an_empty_one_takes_any_prompt():
    house = Harness(max_num_queued_tokens=10)
    house.add("a", [1] * 12)
    with pytest.raises(Overloaded, match="12 prompt tokens"):
        house.add("b", [1])
    house.drain()


def test_retry_after_is_the_time_to_compute_half_of_the_queue_at_the_measured_speed():
    house = Harness(max_num_queued_reqs=3, budget=5)
    house.add("measured", [1] * 20, max_tokens=1)
    house.drain()  # a step takes a second here: 5 tokens a second
    for i in range(3):
        house.add(f"r{i}", [1] * 40, max_tokens=1)
    with pytest.raises(Overloaded, match="try again in 12 s") as e:
        house.add("more", [1])
    assert e.value.retry_after == 12
    assert house.scheduler.snapshot().retry_after == 12
    assert house.scheduler.snapshot().prefill_tokens_per_s == pytest.approx(5)


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


def test_retry_after_covers_what_a_queue_full_of_tokens_lacks_for_this_prompt():
    house = Harness(max_num_queued_tokens=50, budget=5)
    house.add("measured", [1] * 20, max_tokens=1)
    house.drain()
    house.add("waits", [1] * 20, max_tokens=1)
    with pytest.raises(Overloaded) as e:
        house.add("more", [1] * 60, max_tokens=1)
    assert e.value.retry_after == 6  # 30 tokens too many


def test_while_nothing_of_the_queue_is_computed_retry_after_grows_to_its_limit():
    house = Harness(max_num_queued_reqs=1, num_blocks=8, page_size=4)
    house.add("runs", [1] * 4, max_tokens=28, ignore_eos=True)
    house.step()
    house.add("waits", [2] * 20, max_tokens=1)
    seconds = []
    for _ in range(20):
        house.step()
        seconds.append(house.scheduler.snapshot().retry_after)
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]
    house.drain()


@depths
def test_a_second_request_hits_the_pages_of_the_first(depth):
    house = Harness(depth=depth)
    prompt = list(range(1, 11))
    house.add("a", prompt, seed=7, max_tokens=3, ignore_eos=True)
    house.drain()
    before = house.runner.num_computed_tokens
    again = house.add("b", prompt, seed=7, max_tokens=3, ignore_eos=True)
    house.drain()
    assert again.num_cached == 8
    assert house.runner.num_computed_tokens - before == 2 + 2
    assert house.outputs["a"] == house.outputs["b"]
    stats = house.scheduler.snapshot()
    assert (stats.prefix_queries, stats.prefix_hits, stats.cached_tokens) == (20, 8, 8)


def test_the_next_turn_hits_the_pages_of_the_answer_too():
    house = Harness()
    prompt = list(range(1, 11))
    house.add("a", prompt, seed=7, max_tokens=8, ignore_eos=True)
    house.drain()
    turn = house.add("b", [*prompt, *house.outputs["a"], 5, 6], seed=7, max_tokens=2)
    house.drain()
    assert turn.num_cached == 16


@depths
def test_choices_of_one_prompt_compute_it_once(depth):
    house = Harness(depth=depth, budget=8)
    prompt = list(range(1, 34))
    for i in range(8):
        house.add(f"c{i}", prompt, seed=i, max_tokens=4, ignore_eos=True)
    house.drain()
    prompts_once = 33 + 7 * 1
    assert house.runner.num_computed_tokens == prompts_once + 8 * 3
    for i in range(8):
        assert house.outputs[f"c{i}"] == alone("", prompt, i, max_tokens=4, ignore_eos=True)


@depths
def test_those_who_wait_for_a_page_go_on_when_its_leader_is_aborted(depth):
    house = Harness(depth=depth, budget=8)
    prompt = list(range(1, 34))
    for name in "abc":
        house.add(name, prompt, seed=7, max_tokens=4)
    house.step()
    assert house.scheduler.num_running == 1
    house.scheduler.abort("a", house.now)
    house.drain()
    assert house.outputs["b"] == house.outputs["c"] == alone("", prompt, max_tokens=4)


def test_a_waiting_choice_can_be_aborted():
    house = Harness(budget=8)
    for name in "abc":
        house.add(name, list(range(1, 34)), seed=7, max_tokens=4)
    house.step()
    house.scheduler.abort("b", house.now)
    house.scheduler.check()
    house.drain()
    assert house.is_ended("a")
    assert house.is_ended("c")


@depths
def test_preemption_takes_the_newest_and_changes_no_text(depth):
    house = Harness(far_sighted=False, depth=depth, num_blocks=9, page_size=4)
    prompts = {name: [i + 1] * 6 for i, name in enumerate("abc")}
    requests = {
        name: house.add(name, prompt, seed=7, max_tokens=16, ignore_eos=True)
        for name, prompt in prompts.items()
    }
    house.drain()
    assert requests["a"].num_preemptions == 0
    assert house.scheduler.stats.num_preemptions > 0
    for name, prompt in prompts.items():
        assert house.outputs[name] == alone("", prompt, max_tokens=16, ignore_eos=True)


def test_under_priority_the_least_urgent_is_preempted():
    house = Harness(far_sighted=False, num_blocks=9, page_size=4, policy=Policy.PRIORITY)
    urgent = {"a": 3, "b": 0, "c": 1}
    requests = {
        name: house.add(
            name, [i + 1] * 6, seed=7, max_tokens=16, ignore_eos=True, priority=priority
        )
        for i, (name, priority) in enumerate(urgent.items())
    }
    house.drain()
    assert requests["b"].num_preemptions == 0
    assert requests["a"].num_preemptions > 0


def test_a_preempted_request_keeps_its_tokens_and_resumes_with_them():
    house = Harness(far_sighted=False, num_blocks=6, page_size=4, prefix_caching=False)
    house.add("a", [1] * 4, seed=7, max_tokens=16, ignore_eos=True)
    victim = house.add("b", [2] * 4, seed=7, max_tokens=16, ignore_eos=True)
    while victim.status is not RequestStatus.PREEMPTED:
        house.step()
    assert victim.num_computed == 0
    kept = len(house.outputs["b"])
    house.drain()
    resumed = [s for plan in house.runner.plans for s in plan.started if s.request_id == "b"][1]
    assert resumed.output_token_ids == house.outputs["b"][:kept]
    assert house.outputs["b"] == alone("", [2] * 4, max_tokens=16, ignore_eos=True)


@depths
def test_a_seed_is_derived_from_the_id_and_survives_preemption(depth):
    house = Harness(far_sighted=False, depth=depth, num_blocks=6, page_size=4)
    for i, name in enumerate("ab"):
        house.add(name, [i + 1] * 4, max_tokens=16, ignore_eos=True)
    house.drain()
    seeds = {name: set() for name in "ab"}
    for plan in house.runner.plans:
        for start in plan.started:
            seeds[start.request_id].add(start.seed)
    assert [len(found) for found in seeds.values()] == [1, 1]
    assert seeds["a"] != seeds["b"]
    (seed,) = seeds["b"]
    assert house.outputs["b"] == alone("", [2] * 4, seed, max_tokens=16, ignore_eos=True)


@depths
def test_an_error_ends_its_request_alone_and_poisons_no_page(depth):
    house = Harness(depth=depth)
    house.runner.failing.add("bad")
    house.add("bad", list(range(1, 11)), max_tokens=4)
    house.add("good", [7, 7, 7], seed=7, max_tokens=4)
    house.drain()
    assert house.reason("bad") is FinishReason.ERROR
    assert house.updates["bad"][-1].error == "logits are NaN"
    assert house.outputs["good"] == alone("", [7, 7, 7], max_tokens=4)
    assert house.add("later", list(range(1, 11)), max_tokens=1).num_cached == 0
    house.drain()


def test_pages_that_a_failed_request_published_earlier_are_withdrawn():
    house = Harness(budget=4)
    house.runner.failing.add("bad")
    house.add("bad", list(range(1, 11)), max_tokens=4)
    house.drain()
    assert house.add("later", list(range(1, 11)), max_tokens=1).num_cached == 0
    house.drain()
    assert house.scheduler.stats.prefix_hits == 0


def test_pages_are_published_when_their_step_is_applied_not_when_it_is_launched():
    house = Harness(depth=1, budget=32)
    house.add("a", list(range(1, 9)), max_tokens=4, ignore_eos=True)
    house.launch()
    house.launch()
    asked = Request("b", list(range(1, 18)), SamplingParams(), 0.0, index=999)
    house.cache.add(asked)
    assert len(house.cache.match(asked).block_ids) == 0
    house.cache.remove(asked)
    house.apply()
    asked = Request("b", list(range(1, 18)), SamplingParams(), 0.0, index=999)
    house.cache.add(asked)
    assert len(house.cache.match(asked).block_ids) == 2
    house.cache.remove(asked)
    house.apply()
    house.drain()


def test_a_prompt_that_does_not_fit_beside_the_others_waits_and_preempts_nobody():
    house = Harness(num_blocks=8, page_size=4, prefix_caching=False)
    house.add("a", [1] * 16, max_tokens=4, ignore_eos=True)
    house.step()
    house.add("b", [2] * 16, max_tokens=4, ignore_eos=True)
    house.step()
    assert (house.scheduler.num_running, house.scheduler.num_waiting) == (1, 1)
    house.drain()
    assert house.scheduler.stats.num_preemptions == 0


def test_blocks_on_their_way_back_are_waited_for_before_another_is_preempted():
    house = Harness(far_sighted=False, depth=1, num_blocks=12, page_size=4, prefix_caching=False)
    for i in range(3):
        house.add(f"r{i}", [i + 1] * 8, max_tokens=20, ignore_eos=True)
    stats = house.scheduler.stats
    while not stats.num_preemptions:
        house.step()
    assert stats.num_preemptions == 1
    house.step()
    assert stats.num_preemptions == 1
    house.drain()


@depths
def test_prompt_logprobs_come_once_and_whole_despite_preemption(depth):
    house = Harness(far_sighted=False, depth=depth, num_blocks=9, page_size=4, budget=5)
    for i in range(3):
        house.add(f"r{i}", [i + 1] * 10, seed=7, max_tokens=20, ignore_eos=True, prompt_logprobs=1)
    house.drain()
    assert house.scheduler.stats.num_preemptions > 0
    for updates in house.updates.values():
        pieces = [u.prompt_logprobs for u in updates if u.prompt_logprobs]
        covered = [p.start + i for p in pieces for i in range(len(p.entries))]
        assert covered == list(range(1, 10))


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


def test_resetting_the_prefix_cache_forgets_all_pages_and_ends_nothing():
    house = Harness(budget=8)
    prompt = list(range(1, 34))
    for name in "ab":
        house.add(name, prompt, seed=7, max_tokens=4)
    house.step()
    house.scheduler.reset_prefix_cache()
    house.scheduler.check()
    house.drain()
    assert house.outputs["a"] == house.outputs["b"] == alone("", prompt, max_tokens=4)


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
