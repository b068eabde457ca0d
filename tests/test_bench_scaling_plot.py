"""The picture of how prompts, decode steps and memory grow: its record, its points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsa_serve.bench import scaling_plot

RESULTS = Path(__file__).parent.parent / "bench/results/h200"


def point(what, context, ms, *, requests=1):
    return {
        "what": what,
        "num_requests": requests,
        "context_len": context,
        "ms": {"median": ms},
        "floor_ms": ms / 2,
        "peak_bytes": 3e9,
    }


def test_prompts_are_told_by_the_token_and_only_single_requests_count():
    records = [
        {"points": [point("ttft", 2000, 10.0), point("decode", 500, 4.0)]},
        {"points": [point("ttft", 1000, 4.0), point("decode", 500, 9.0)]},
        {"points": [point("decode", 100, 1.0, requests=8), point("turn", 100, 1.0)]},
    ]
    found = scaling_plot.read_scaling(records)
    assert found.prefill_us == [(1000, 4.0), (2000, 5.0)]
    assert found.prefill_floor_us == [(1000, 2.0), (2000, 2.5)]
    assert found.decode_ms == [(500, 4.0)]
    assert found.peak_gb == [(1000, 3.0), (2000, 3.0), (500, 3.0)]


def test_records_without_single_requests_are_refused():
    with pytest.raises(ValueError, match="bench latency"):
        scaling_plot.read_scaling([{"points": [point("turn", 1, 1.0)]}])


def test_memory_stays_where_it_was_from_8k_to_a_million_tokens_of_the_kept_records(tmp_path):
    picture = tmp_path / "scaling.png"
    paths = [str(RESULTS / f"latency_8b_{name}.json") for name in ("nsa", "million")]
    result = CliRunner().invoke(scaling_plot.app, [str(picture), *paths])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    records = [json.loads(Path(path).read_text()) for path in paths]
    peaks = [peak for _, peak in scaling_plot.read_scaling(records).peak_gb]
    assert max(peaks) < 1.01 * min(peaks)


def test_files_that_are_no_records_are_refused_in_one_line(tmp_path):
    other = RESULTS / "sm_spread.json"
    for record, why in ((tmp_path / "none.json", "does not exist"), (other, "no records")):
        result = CliRunner().invoke(scaling_plot.app, [str(tmp_path / "a.png"), str(record)])
        assert result.exit_code == 2
        assert why in " ".join(result.output.replace("│", "").split())
