"""The device's work in a profile: overlaps count once, gaps are found."""

from __future__ import annotations

import pytest
import typer

from nsa_serve.bench.engine_cli import parse_case
from nsa_serve.bench.timeline import Launch, summarise


def test_overlapping_launches_count_once_and_the_longest_gap_is_found():
    launches = [
        Launch("b", 30.0, 50.0),
        Launch("a", 0.0, 10.0),
        Launch("a", 5.0, 20.0),  # overlaps the first for 5 µs
        Launch("c", 35.0, 40.0),  # within b
    ]
    found = summarise(launches, num_requests=2, context=64, step_ms=0.05, steps=1)
    assert found.busy_ms == pytest.approx(0.040)
    assert found.longest_gap_us == pytest.approx(10.0)
    assert found.launches == 4
    assert list(found.by_kernel) == ["a", "b", "c"]
    assert found.by_kernel["a"] == pytest.approx(0.025)
    assert found.record()["busy_share"] == pytest.approx(0.8)


def test_figures_are_of_one_step():
    launches = [Launch("a", 10.0 * i, 10.0 * i + 5.0) for i in range(4)]
    found = summarise(launches, num_requests=1, context=64, step_ms=0.02, steps=2)
    assert found.busy_ms == pytest.approx(0.010)
    assert found.launches == 2


def test_no_launch_is_no_work():
    found = summarise([], num_requests=1, context=64, step_ms=1.0)
    assert (found.busy_ms, found.launches, found.by_kernel) == (0.0, 0.0, {})


def test_cases_are_requests_by_context():
    assert parse_case("8x65536") == (8, 65536)


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x64", "8x0", "8x64x2", "-1x64"])
def test_a_case_that_is_none_is_refused(text):
    with pytest.raises(typer.BadParameter, match="REQUESTSxCONTEXT"):
        parse_case(text)
