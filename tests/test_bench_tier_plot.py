"""The picture of throughput over hit rate: its record, its floor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsa_serve.bench import tier_plot

RECORD = Path(__file__).parent.parent / "bench/results/h200/host_tier_rates.jsonl"


def line(hit_rate, step_ms, missed_mb, link_ms):
    figures = {"hit_rate": hit_rate, "streams": 80, "step_ms": {"median": step_ms}}
    return json.dumps({**figures, "missed_mb": missed_mb, "link_ms": link_ms})


def test_the_floor_is_the_resident_step_and_what_the_link_takes():
    lines = "\n".join(['{"torch": "2"}', line(0.99, 11.0, 40.0, 1.0), line(0.9, 15.0, 160.0, 4.0)])
    low, high = rates = tier_plot.read_rates(lines)
    assert (low.hit_rate, high.hit_rate) == (0.9, 0.99)
    assert low.link_gb_s == high.link_gb_s == 40.0
    resident = tier_plot.resident_ms(rates)
    assert resident == pytest.approx(10.0)
    assert tier_plot.floor_tokens_per_s(low, resident) == pytest.approx(80e3 / 14)
    assert low.tokens_per_s == pytest.approx(80e3 / 15)


def test_a_record_without_rates_is_refused():
    with pytest.raises(ValueError, match="hit_rate"):
        tier_plot.read_rates('{"torch": "2"}\n')


def test_the_kept_record_is_drawn_and_stays_near_its_floor(tmp_path):
    picture = tmp_path / "rates.png"
    result = CliRunner().invoke(tier_plot.app, [str(RECORD), str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    rates = tier_plot.read_rates(RECORD.read_text())
    resident = tier_plot.resident_ms(rates)
    for rate in rates:
        assert rate.tokens_per_s >= 0.85 * tier_plot.floor_tokens_per_s(rate, resident)
