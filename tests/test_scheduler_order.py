"""Who goes first, that nobody starves, and that what is overdue ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.config import Policy
from nsa_serve.errors import InvalidParameter
from nsa_serve.request import FinishReason, Request, SamplingParams
from nsa_serve.schedule.limits import SLACK, TimeLimits
from nsa_serve.schedule.policy import MAX_SHIFT, ORDERS

from .fake_runner import Harness, make_request, run_alone

priorities = st.integers(-(1 << 31), (1 << 31) - 1)
deadlines = st.one_of(st.none(), st.floats(0.001, 1e9))
moments = st.floats(0, 1e7)


def request_at(arrival, index=0, priority=0, deadline=None, timeout=None):
    return Request(
        f"r{index}", [1], SamplingParams(), arrival, priority, deadline, timeout, index=index
    )


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


@given(priorities, priorities, deadlines, deadlines, moments, st.sampled_from(list(Policy)))
def test_whoever_waited_twice_the_shift_stands_before_all_who_come(p, q, d, e, arrival, policy):
    order = ORDERS[policy]
    old = request_at(arrival, 0, p, d)
    new = request_at(arrival + 2 * MAX_SHIFT + 0.001, 1, q, e)
    assert order(old) < order(new)


@given(st.integers(-1000, 999), moments)
def test_of_two_that_come_together_the_lower_priority_value_goes_first(priority, arrival):
    order = ORDERS[Policy.PRIORITY]
    assert order(request_at(arrival, 1, priority)) < order(request_at(arrival, 0, priority + 1))


def test_the_nearest_deadline_goes_first_and_none_counts_as_a_far_one():
    house = Harness(max_num_seqs=1, policy=Policy.DEADLINE)
    wishes = [("none", None), ("far", 1e6), ("near", 3.0), ("middle", 50.0), ("tight", 1.0)]
    for name, deadline in wishes:
        house.add(name, [1, 2], max_tokens=1, deadline=deadline)
    house.drain()
    started = [start.request_id for plan in house.runner.plans for start in plan.started]
    assert started == ["near", "tight", "middle", "none", "far"]


def test_a_time_out_is_a_deadline_where_there_is_no_other():
    house = Harness(max_num_seqs=1, policy=Policy.DEADLINE)
    house.add("patient", [1, 2], max_tokens=1)
    house.add("hurried", [1, 2], max_tokens=1, timeout=100.0)
    house.drain()
    assert house.runner.plans[0].started[0].request_id == "hurried"


def test_what_ends_after_its_deadline_is_counted():
    house = Harness()
    house.add("late", [1, 2], max_tokens=9, ignore_eos=True, deadline=3.0)
    house.add("in time", [1, 2], max_tokens=9, ignore_eos=True, deadline=30.0)
    house.drain()
    assert house.scheduler.snapshot().num_late == 1


@st.composite
def crowds(draw):
    """An endless stream of those who go first, and when the one of least rank comes into it."""
    return {
        "policy": draw(st.sampled_from(list(Policy))),
        "size": draw(st.integers(1, 12)),
        "tokens": draw(st.integers(1, 6)),
        "depth": draw(st.integers(0, 1)),
        "budget": draw(st.sampled_from([4, 8, 16])),
        "far_sighted": draw(st.booleans()),
        "long": draw(st.booleans()),
        "gap": draw(st.floats(1.0, 20.0)),
    }


@settings(max_examples=40)
@given(crowds())
def test_nobody_starves_however_urgent_those_are_that_keep_coming(crowd):
    house = Harness(
        policy=crowd["policy"], depth=crowd["depth"], budget=crowd["budget"], max_num_seqs=2,
        num_blocks=10, page_size=4, max_model_len=40, far_sighted=crowd["far_sighted"],
        max_num_queued_reqs=1 << 20,
    )  # fmt: skip
    prompt = [7] * (30 if crowd["long"] else 3)
    low = house.add("low", prompt, max_tokens=4, priority=1 << 30, ignore_eos=True)
    ahead, count = 0, 0
    while not house.is_ended("low"):
        # One comes at each step, which is more than two rows can serve.
        arrival = house.now + crowd["gap"] / 10
        if arrival - low.arrival < 2 * MAX_SHIFT / 10:
            house.now = arrival
        house.now += crowd["gap"]
        added = house.scheduler.add(
            make_request(
                f"u{count}", [count % 40 + 1] * crowd["size"], priority=-(1 << 31), deadline=0.001,
                max_tokens=crowd["tokens"], ignore_eos=True,
            ), house.now,
        )  # fmt: skip
        house.outputs[added.request_id], house.updates[added.request_id] = [], []
        count += 1
        order = ORDERS[crowd["policy"]]
        # Each of those before it takes a step for each chunk and token, and can be preempted by
        # those before itself only, each time by one of them that then goes on.
        if order(added) < order(low):
            ahead += crowd["size"] + crowd["tokens"] + 4
        house.step()
        assert len(house.runner.plans) <= 2 * ahead + 200, "more steps than those before it take"
    assert low.finish_reason is FinishReason.LENGTH


def test_what_is_overdue_ends_once_wherever_it_stands():
    house = Harness(max_num_seqs=1)
    house.add("runs", [1, 2], max_tokens=50, ignore_eos=True, timeout=4.5)
    house.add("waits", [3, 4], max_tokens=50, ignore_eos=True, timeout=2.5)
    house.add("stays", [5, 6], seed=3, max_tokens=5, ignore_eos=True)
    ended = []
    while house.scheduler.has_work:
        ended += [(request.request_id, house.now) for request in house.end_overdue()]
        house.step()
    assert ended == [("waits", 5.0), ("runs", 6.0)]
    assert house.scheduler.snapshot().num_finished["timeout"] == 2
    same = make_request("", [5, 6], max_tokens=5, ignore_eos=True)
    assert house.outputs["stays"] == run_alone(same, 3)
    assert house.cache.num_in_use == 0


def test_the_servers_time_out_bounds_the_requests_own():
    house = Harness(request_timeout=10.0)
    assert house.add("a", [1], max_tokens=9).timeout == 10.0
    assert house.add("b", [1], max_tokens=9, timeout=3.0).timeout == 3.0
    assert house.add("c", [1], max_tokens=9, timeout=30.0).timeout == 10.0
    house.drain()


@pytest.mark.parametrize("field", ["timeout", "deadline"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_that_means_nothing_is_refused(field, value):
    house = Harness()
    with pytest.raises(InvalidParameter, match=f"{field} must be more than 0 seconds") as e:
        house.add("a", [1], **{field: value})
    assert e.value.param == field


def test_time_limits_of_ended_requests_are_forgotten():
    limits, live = TimeLimits(), {}
    for i in range(10 * SLACK):
        limits.add(request_at(0.0, i, timeout=1e6))
    assert limits.take_due(1.0, live) == []
    assert len(limits._heap) <= SLACK


def test_an_id_given_anew_does_not_inherit_a_time_limit():
    limits = TimeLimits()
    limits.add(request_at(0.0, 1, timeout=5.0))
    again = request_at(1.0, 2)
    assert limits.take_due(9.0, {"r1": again}) == []
