"""Books of other sizes beside a tier's own: the same numbers where the sizes are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nsa_serve.bench.real_hits import COUNTS, ComparedPrefetcher, app
from tests.checkpoints import PHIS, gated, nsa_config_json, write_checkpoint
from tests.tiered_engine import make_requests, run, tiered


def test_books_of_the_tiers_own_size_count_what_the_tier_counts(tmp_path: Path) -> None:
    config = nsa_config_json(gated(PHIS["mean"]), max_position_embeddings=1024)
    engine = tiered(write_checkpoint(tmp_path, config))
    tier = engine._runner.tier  # type: ignore[attr-defined]
    size = tier.prefetcher.num_hot
    sizes = [(size, True), (size, False), (2 * size, True), (1, True)]
    tier.prefetcher = compared = ComparedPrefetcher(tier, sizes)
    run(engine, make_requests(8, seed=1))
    own, same, without, larger, smaller = compared.books()
    assert (own.decode, own.prefill) == (same.decode, same.prefill)
    report = engine.stats().tier
    totals = [a + b for a, b in zip(own.decode, own.prefill, strict=True)]
    piece = report.prefetched_bytes // report.prefetched
    assert totals == [
        report.lookups, report.hits, report.fetched_bytes // piece, report.prefetched,
        report.prefetch_hits,
    ]  # fmt: skip
    assert without.decode[COUNTS.index("prefetched")] == 0 < own.decode[COUNTS.index("prefetched")]
    assert smaller.hit_rate < own.hit_rate < larger.hit_rate < 1
    assert {book.decode[0] for book in compared.books()} == {own.decode[0]}


@pytest.mark.usefixtures("small_device")
def test_a_document_and_a_conversation_are_measured(tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text(" ".join(f"Sentence {at} tells of the number {at * at}." for at in range(200)))
    arguments = [
        "--model", "smollm2-135m-instruct", "--text", text, "--contexts", 1100, "--turns", 1,
        "--passage", 60, "--answer", 3, "--output", output,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    found: Any = json.loads(output.read_text())
    assert [case["case"] for case in found["cases"]] == ["document", "chat"]
    books = found["cases"][0]["books"]
    assert [(book["hot"], book["with_runners_up"]) for book in books] == [
        (4, True), (16, False), (16, True),
    ]  # fmt: skip
    for book in books:
        decode = book["decode"]
        assert decode["lookups"] >= decode["hits"] > 0
        assert book["hit_rate"] == decode["hits"] / decode["lookups"]


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLOTS", 18), ("HOT", (16,)), ("BUDGET", 128)):
        monkeypatch.setattr(f"nsa_serve.bench.real_hits.{name}", value)
