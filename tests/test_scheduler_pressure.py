"""Short requests beside long prompts, and a cache too small for all: rules, then figures.

The figures are of the real scheduler and cache over a simulated H200, whose step costs are fitted
to measured ones.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.bench.pressure import Work, beside_long, oversubscribed
from nsa_serve.bench.simulated import H200_8B, SimulatedEngine
from nsa_serve.request import Request, SamplingParams
from nsa_serve.schedule.forecast import UNKNOWN, WINDOW, Forecast, OutputLengths

from .fake_runner import DEPTHS, Harness, NothingExpected


def sizes(plan):
    return {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}


def long_house(**options):
    house = Harness(num_blocks=200, max_model_len=700, **options)
    house.add("long", [1] * 400, max_tokens=4, ignore_eos=True)
    return house


def test_a_long_prompt_alone_gets_whole_steps():
    house = long_house(budget=32)
    assert [sizes(house.step()) for _ in range(3)] == [{"long": 32}] * 3


def test_beside_one_that_decodes_a_long_prompt_gets_a_quarter():
    house = Harness(num_blocks=200, max_model_len=700, budget=32)
    house.add("decodes", [2] * 3, max_tokens=50, ignore_eos=True)
    house.step()
    house.add("long", [1] * 400, max_tokens=4, ignore_eos=True)
    assert [sizes(house.step()) for _ in range(3)] == [{"decodes": 1, "long": 8}] * 3


def test_where_nobody_waits_for_tokens_prompts_take_what_decodes_leave_in_order():
    house = Harness(num_blocks=200, max_model_len=700, budget=32, depth=1, interactive=False)
    house.add("decodes", [2] * 3, max_tokens=50, ignore_eos=True)
    house.step()
    house.add("long", [1] * 60, max_tokens=1)
    house.add("short", [3] * 4, max_tokens=1)
    plans = [house.step() for _ in range(2)]
    assert [sizes(plan) for plan in plans] == [
        {"decodes": 1, "long": 31}, {"decodes": 1, "long": 29, "short": 2},
    ]  # fmt: skip


def test_where_nobody_waits_for_tokens_steps_are_planned_behind_whole_ones():
    house = long_house(budget=32, depth=1, interactive=False)
    assert [sizes(house.launch()) for _ in range(2)] == [{"long": 32}] * 2
    house.apply()
    house.drain()


def test_short_prompts_share_the_next_step_with_a_quarter_of_the_long_one():
    house = long_house(budget=32)
    house.step()
    for i in range(5):
        house.add(f"s{i}", [i + 2] * 8, max_tokens=1)
    assert sizes(house.step()) == {"s0": 8, "s1": 8, "s2": 8, "long": 8}
    assert sizes(house.step()) == {"s3": 8, "s4": 8, "long": 8}
    assert sizes(house.step()) == {"long": 32}


def test_nothing_is_planned_behind_a_whole_step_of_a_long_prompt():
    house = long_house(budget=32, depth=1)
    assert sizes(house.launch()) == {"long": 32}
    assert house.launch() is None
    house.add("short", [2] * 4, max_tokens=1)
    house.apply()
    assert sizes(house.launch()) == {"short": 4, "long": 8}
    house.apply()
    assert sizes(house.launch()) == {"long": 32}


def test_of_two_long_prompts_the_one_that_lacks_least_gets_half():
    house = long_house(budget=32)
    house.step()
    house.add("less", [2] * 60, max_tokens=1)
    assert sizes(house.step()) == {"less": 16, "long": 16}
    assert sizes(house.step()) == {"less": 16, "long": 16}


@DEPTHS
@pytest.mark.parametrize("num_decoding", [0, 16])
def test_a_short_request_beside_a_128k_prompt_has_its_token_within_two_chunks(depth, num_decoding):
    engine = SimulatedEngine(H200_8B, num_blocks=8192, depth=depth)
    found = beside_long(
        engine, long_len=131_072, short_len=128, token_budget=8192, num_trials=100,
        num_decoding=num_decoding,
    ).record()  # fmt: skip
    assert found["ttft_chunks_p99"] <= 2
    assert found["ttft_chunks_max"] <= 2
    assert found["long_slowdown"] < 1.2
    if num_decoding:
        assert found["gap_chunks_p99"] < 0.4


def pressed(lengths, factor, knows):
    engine = SimulatedEngine(H200_8B, num_blocks=160, max_num_seqs=64, lengths=lengths)
    found = oversubscribed(engine, Work(120, 256, 256, knows), factor)
    while engine.has_work:
        engine.turn()
    engine.scheduler.check()
    assert engine.cache.num_in_use == 0
    return found, engine.scheduler.snapshot()


@pytest.mark.parametrize("knows", [True, False])
def test_three_times_too_many_requests_keep_the_throughput(knows):
    peak = max(
        pressed(OutputLengths(), factor, knows)[0].output_tokens_per_s for factor in (1.0, 1.5)
    )
    found, stats = pressed(OutputLengths(), 3.0, knows)
    assert found.output_tokens_per_s >= 0.85 * peak
    work = Work(120, 256, 256, knows)
    assert stats.num_lost_tokens < 0.05 * sum(map(sum, work.lengths()))


def test_expecting_nothing_preempts_many_times_as_often():
    _, hopeful = pressed(NothingExpected(), 3.0, False)
    _, learned = pressed(OutputLengths(), 3.0, False)
    assert hopeful.num_preemptions > 3 * learned.num_preemptions


def request(num_outputs=0, max_tokens=1000, **sampling):
    made = Request("r", [1] * 10, SamplingParams(max_tokens=max_tokens, **sampling), 0.0)
    made.limit = 10 + max_tokens
    made.output_token_ids = [1] * num_outputs
    return made


def test_outputs_are_expected_to_be_as_long_as_those_that_were_longer():
    lengths = OutputLengths()
    assert lengths.remaining(request()) == UNKNOWN
    for length in (10, 20, 30, 100):
        lengths.record(request(length))
    assert lengths.remaining(request()) == 40
    assert lengths.remaining(request(15)) == 50 - 15
    assert lengths.remaining(request(30)) == 70
    assert lengths.remaining(request(200)) == 200
    assert lengths.remaining(request(15, max_tokens=20)) == 5


def test_a_request_that_ends_at_its_limit_alone_is_known_and_teaches_nothing():
    lengths = OutputLengths()
    lengths.record(request(900, ignore_eos=True))
    assert lengths.remaining(request()) == UNKNOWN
    assert lengths.remaining(request(100, ignore_eos=True)) == 900
    assert lengths.remaining(request(ignore_eos=True, stop=("x",))) == UNKNOWN


@given(st.lists(st.integers(1, 500), min_size=1, max_size=2 * WINDOW), st.integers(0, 600))
def test_expected_lengths_are_means_over_the_window(recorded, given_so_far):
    lengths = OutputLengths()
    for length in recorded:
        lengths.record(request(length))
    longer = [length for length in recorded[-WINDOW:] if length > given_so_far]
    expected = -(-sum(longer) // len(longer)) - given_so_far if longer else max(1, given_so_far)
    assert lengths.remaining(request(given_so_far, max_tokens=10_000)) == expected


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 50)), min_size=1, max_size=12),
    st.tuples(st.integers(0, 200), st.integers(0, 50)),
)
def test_the_forecast_peak_is_the_fullest_moment_of_all(rows, extra):
    page = 16

    def simulate(rows):
        moments = range(max(remaining for remaining, _ in rows) + 1)
        return max(
            sum(pages + moment / page for remaining, pages in rows if remaining >= moment)
            for moment in moments
        )

    forecast = Forecast(page)
    for remaining, pages in rows:
        forecast.add(remaining, pages)
    assert forecast.peak() == pytest.approx(simulate(rows))
    assert forecast.peak_with(*extra) == pytest.approx(simulate([*rows, extra]))
    assert forecast.peak() == pytest.approx(simulate(rows))


def test_the_victim_is_the_one_with_least_work_to_lose():
    house = Harness(num_blocks=13, page_size=4, far_sighted=False, prefix_caching=False)
    first = house.add("first", [1] * 14, seed=1, max_tokens=20, ignore_eos=True)
    small = house.add("small", [2] * 4, seed=1, max_tokens=20, ignore_eos=True)
    large = house.add("large", [3] * 14, seed=1, max_tokens=20, ignore_eos=True)
    while not house.scheduler.stats.num_preemptions:
        assert house.step() is not None
    assert (first.num_preemptions, small.num_preemptions, large.num_preemptions) == (0, 1, 0)
    house.drain()


def test_pages_that_others_hold_too_count_as_kept():
    house = Harness(num_blocks=14, page_size=4, far_sighted=False)
    shared = [5] * 24
    house.add("first", [*shared, 1], seed=1, max_tokens=24, ignore_eos=True)
    house.step()
    sharing = house.add("sharing", [*shared, 2], seed=1, max_tokens=24, ignore_eos=True)
    alone = house.add("alone", [3] * 10, seed=1, max_tokens=24, ignore_eos=True)
    while not house.scheduler.stats.num_preemptions:
        assert house.step() is not None
    # It has computed more tokens, but most of them stay in the cache.
    assert (sharing.num_preemptions, alone.num_preemptions) == (1, 0)
    assert house.scheduler.stats.num_lost_tokens < 12
    house.drain()
