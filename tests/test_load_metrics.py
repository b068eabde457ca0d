"""Definitions of a load test's figures against cases worked out by hand; arrivals; the search."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.bench.load.arrivals import Arrivals, RampUp
from nsa_serve.bench.load.console import warnings
from nsa_serve.bench.load.gauges import read_gauges
from nsa_serve.bench.load.metrics import (
    Measured,
    details,
    meets,
    parse_goodput,
    peak_concurrency,
    peak_token_rate,
    percentile,
    summary,
)
from nsa_serve.bench.load.outcome import Outcome, Turn
from nsa_serve.bench.load.sweep import RateSearch, keeps_limits, knee
from nsa_serve.errors import ConfigError


def outcome(sent, times, *, end=None, tokens=None, **fields):
    return Outcome(
        Turn("", 9, prompt_len=10), due=sent, sent=sent, token_times=times, end=end,
        completion_tokens=tokens, done=True, **fields,
    )  # fmt: skip


# Sent at 0: tokens at 1, 1.5, 2.5, closed at 2.75. Sent at 2: one token at 2.25. Two that failed.
TWO = (outcome(0.0, [1.0, 1.5, 2.5], end=2.75), outcome(2.0, [2.25]))
FAILED = (outcome(0.0, [], error="HTTP 503: full"), outcome(1.0, [1.5], error="broke"))
MEASURED = Measured((*TWO, *FAILED), start=0.0, duration=4.0)


def test_figures_are_those_worked_out_by_hand():
    found = summary(MEASURED, percentiles=(50.0, 99.0), goodput={"ttft": 500.0})
    assert (found["completed"], found["failed"], found["duration"]) == (2, 2, 4.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 4)
    assert (found["request_throughput"], found["output_throughput"]) == (0.5, 1.0)
    assert found["total_token_throughput"] == 6.0
    assert found["request_goodput"] == 0.25  # only the second came within 500 ms
    # TTFT 1000 and 250 ms; TPOT of the first alone: (2750 - 1000) / 2; gaps 500 and 1000.
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (625.0, 625.0)
    assert (found["std_ttft_ms"], found["p50_ttft_ms"]) == (375.0, 625.0)
    assert found["p99_ttft_ms"] == pytest.approx(992.5)
    assert found["mean_tpot_ms"] == found["p99_tpot_ms"] == 875.0
    assert (found["mean_itl_ms"], found["p99_itl_ms"]) == (750.0, 995.0)
    assert (found["mean_e2el_ms"], found["std_e2el_ms"]) == (1500.0, 1250.0)


def test_keys_are_those_of_vllm():
    keys = set(summary(MEASURED))
    kinds = ("mean", "median", "std", "p99")
    assert {f"{kind}_{m}_ms" for kind in kinds for m in ("ttft", "tpot", "itl", "e2el")} <= keys
    assert {
        "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
        "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
        "max_output_tokens_per_s", "max_concurrent_requests",
    } <= keys  # fmt: skip


def test_errors_are_counted_by_kind_and_told():
    found = summary(Measured((*TWO, *FAILED, FAILED[0]), 0.0, 4.0))
    assert found["error_counts"] == {"HTTP 503: full": 2, "broke": 1}
    assert warnings(found) == ["2 × HTTP 503: full", "1 × broke"]


def test_what_a_person_cut_is_neither_failed_nor_completed():
    cut = outcome(0.0, [1.0], interrupted=True)
    found = summary(Measured((*TWO, cut), 0.0, 4.0, interrupted=True))
    assert (found["completed"], found["failed"], found["interrupted"]) == (2, 0, 1)
    assert any("interrupted: 1" in line for line in warnings(found))


def test_a_client_that_was_late_is_told_of():
    late = Outcome(Turn("", 1), due=0.0, sent=0.5, token_times=[0.6])
    found = summary(Measured((late,), 0.0, 1.0))
    assert found["p99_client_lag_ms"] == 500.0
    assert any("client was busy" in line for line in warnings(found))


def test_the_servers_count_of_tokens_goes_before_the_chunks():
    packed = outcome(0.0, [1.0, 3.0], tokens=5)
    assert (packed.output_len, packed.tpot) == (5, 0.5)


def test_nothing_answered_gives_zeros():
    found = summary(Measured(FAILED, 0.0, 1.0))
    assert (found["completed"], found["p99_ttft_ms"], found["output_throughput"]) == (0, 0.0, 0.0)


def test_an_answer_of_one_token_meets_any_limit_on_tpot():
    assert meets(TWO[1], {"tpot": 0.0})
    assert not meets(TWO[0], {"tpot": 874.9})
    assert meets(TWO[0], {"tpot": 875.0, "ttft": 1000.0, "e2el": 2750.0})
    assert not meets(FAILED[1], {"ttft": 1e9})


def test_details_have_a_row_for_every_request():
    rows = details(MEASURED)
    assert {len(column) for column in rows.values()} == {4}
    assert rows["itls"][0] == [0.5, 1.0]
    assert rows["errors"][2] == "HTTP 503: full"
    assert (rows["output_lens"][3], rows["ttfts"][2]) == (0, 0.0)


@given(
    st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=40),
    st.floats(0, 100, allow_subnormal=False),
)
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-9)


def test_peaks_are_of_one_second_and_of_one_instant():
    assert peak_token_rate(TWO) == 2  # 1.0 and 1.5; 2.25 and 2.5 are as many
    assert peak_concurrency(TWO) == 2
    after = outcome(2.75, [3.0])
    assert peak_concurrency((TWO[0], after)) == 1  # one ends when the other begins


@pytest.mark.parametrize(
    "words", [["ttft:200", "tpot:50"], ["ttft:200 tpot:50"], ["ttft:200,tpot:50"]]
)
def test_limits_may_be_written_in_several_ways(words):
    assert parse_goodput(words) == {"ttft": 200.0, "tpot": 50.0}


@pytest.mark.parametrize("word", ["itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:nan"])
def test_a_limit_that_is_none_is_refused(word):
    with pytest.raises(ConfigError, match="--goodput"):
        parse_goodput([word])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_end_where_the_rate_says_and_spread_as_their_process(burstiness):
    offsets = Arrivals(rate=5.0, burstiness=burstiness).offsets(20_000, random.Random(1))
    assert offsets[-1] == pytest.approx(4000.0)
    gaps = [b - a for a, b in zip([0.0, *offsets], offsets, strict=False)]
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.05)


def test_all_come_at_once_without_a_rate_and_evenly_without_chance():
    rng = random.Random(0)
    assert Arrivals().offsets(3, rng) == [0.0, 0.0, 0.0]
    assert Arrivals(4.0, math.inf).offsets(3, rng) == [0.25, 0.5, 0.75]
    assert Arrivals(4.0).offsets(0, rng) == []


@pytest.mark.parametrize(
    ("ramp", "gaps"),
    [(RampUp.LINEAR, [1.0, 1 / 2.5, 1 / 4]), (RampUp.EXPONENTIAL, [1.0, 0.5, 0.25])],
)
def test_a_ramp_climbs_from_its_first_rate_to_its_last(ramp, gaps):
    found = Arrivals(burstiness=math.inf, ramp=ramp, start_rate=1, end_rate=4)
    offsets = found.offsets(3, random.Random(0))
    assert offsets == pytest.approx([gaps[0], sum(gaps[:2]), sum(gaps)])


def searched(capacity, limit_rate, **fields):
    """Rates that a search tries on a server of this capacity that keeps limits up to a rate."""
    search = RateSearch(**{"start": 1.0, "stop": 1000.0, "precision": 0.05, **fields})
    while (rate := search.next_rate()) is not None:
        search.add(rate, 100 * min(rate, capacity), rate <= limit_rate)
    return search


@given(st.floats(0.1, 500), st.floats(1.0, 3.0))
def test_a_search_finds_the_highest_rate_that_keeps_the_limits(limit_rate, margin):
    search = searched(limit_rate * margin, limit_rate)
    best, bad = search.best_good, search.worst_bad
    assert best is not None
    assert bad is not None
    assert best <= limit_rate < bad
    assert bad - best <= 0.05 * bad


def test_a_search_without_limits_ends_where_throughput_stops_growing():
    rates = [rate for rate, _, _ in searched(20.0, math.inf).tried]
    assert rates == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


def test_a_search_ends_at_the_highest_rate_allowed_and_gives_up_on_the_hopeless():
    assert max(rate for rate, _, _ in searched(1e9, math.inf, stop=10.0).tried) == 10.0
    hopeless = searched(10.0, 0.0)
    assert hopeless.best_good is None
    assert len(hopeless.tried) < 10


def test_the_knee_is_where_throughput_bends():
    points = [(rate, min(rate, 8.0)) for rate in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)]
    assert knee(points) == 8.0
    assert knee([(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]) is None
    assert knee(points[:2]) is None
    assert knee([(1.0, 5.0), (2.0, 5.0), (4.0, 5.0)]) is None


def test_a_rate_with_a_failed_request_keeps_no_limit():
    good = {"failed": 0, "completed": 5, "p99_ttft_ms": 100.0}
    assert keeps_limits(good, {"ttft": 100.0})
    assert not keeps_limits(good, {"ttft": 99.0})
    assert not keeps_limits({**good, "failed": 1}, {})
    assert not keeps_limits({**good, "completed": 0}, {})


def test_gauges_are_read_whatever_the_prefix_and_summed_over_engines():
    page = (
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 4\n'
        'vllm:num_requests_waiting{engine="0"} 1e1\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.25\n'
    )
    found = read_gauges(page, 7.0)
    assert (found.at, found.running, found.waiting, found.cache_usage) == (7.0, 7.0, 10.0, 0.375)
    assert read_gauges("up 1\n", 7.0) is None
    assert read_gauges("a:num_requests_running 1\na:num_requests_waiting 0\n", 0.0) is not None
