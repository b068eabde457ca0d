"""Pages that requests share, and pages that they lack: hits, waiting, preemption."""

from nsa_serve.config import Policy
from nsa_serve.request import FinishReason, Request, RequestStatus, SamplingParams

from .fake_runner import DEPTHS, Harness, outputs_alone


@DEPTHS
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


@DEPTHS
def test_choices_of_one_prompt_compute_it_once(depth):
    house = Harness(depth=depth, budget=8)
    prompt = list(range(1, 34))
    for i in range(8):
        house.add(f"c{i}", prompt, seed=i, max_tokens=4, ignore_eos=True)
    house.drain()
    prompts_once = 33 + 7 * 1
    assert house.runner.num_computed_tokens == prompts_once + 8 * 3
    for i in range(8):
        assert house.outputs[f"c{i}"] == outputs_alone(prompt, i, max_tokens=4, ignore_eos=True)


@DEPTHS
def test_those_who_wait_for_a_page_go_on_when_its_leader_is_aborted(depth):
    house = Harness(depth=depth, budget=8)
    prompt = list(range(1, 34))
    for name in "abc":
        house.add(name, prompt, seed=7, max_tokens=4)
    house.step()
    assert house.scheduler.num_running == 1
    house.scheduler.abort("a", house.now)
    house.drain()
    assert house.outputs["b"] == house.outputs["c"] == outputs_alone(prompt, max_tokens=4)


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


@DEPTHS
def test_an_error_ends_its_request_alone_and_poisons_no_page(depth):
    house = Harness(depth=depth)
    house.runner.failing.add("bad")
    house.add("bad", list(range(1, 11)), max_tokens=4)
    house.add("good", [7, 7, 7], seed=7, max_tokens=4)
    house.drain()
    assert house.reason("bad") is FinishReason.ERROR
    assert house.updates["bad"][-1].error == "logits are NaN"
    assert house.outputs["good"] == outputs_alone([7, 7, 7], max_tokens=4)
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


def test_resetting_the_prefix_cache_forgets_all_pages_and_ends_nothing():
    house = Harness(budget=8)
    prompt = list(range(1, 34))
    for name in "ab":
        house.add(name, prompt, seed=7, max_tokens=4)
    house.step()
    house.scheduler.reset_prefix_cache()
    house.scheduler.check()
    house.drain()
    assert house.outputs["a"] == house.outputs["b"] == outputs_alone(prompt, max_tokens=4)


@DEPTHS
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
        assert house.outputs[name] == outputs_alone(prompt, max_tokens=16, ignore_eos=True)


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
    assert house.outputs["b"] == outputs_alone([2] * 4, max_tokens=16, ignore_eos=True)


@DEPTHS
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
    assert house.outputs["b"] == outputs_alone([2] * 4, seed, max_tokens=16, ignore_eos=True)


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


@DEPTHS
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
