"""The comparison of ``bench serve`` with guidellm and aiperf: what is asked, and what is read."""

import json
import sys
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from nsa_serve.bench import load_agreement
from nsa_serve.bench.load_agreement import Run, ServerTimes, Trial, compare
from nsa_serve.bench.load_testers import (
    AIPerf,
    BenchServe,
    Figures,
    GuideLLM,
    Load,
    Site,
    Tester,
    write_tokenizer,
)
from tests.test_docs import parse

RATE = Load("/v1/completions", rate=1.9)
CHAT = Load("/v1/chat/completions", concurrency=8)
PAGE = """\
# TYPE nsa_serve:time_to_first_token_seconds histogram
nsa_serve:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 4.0
nsa_serve:time_to_first_token_seconds_sum{model_name="m"} 1.0
nsa_serve:time_to_first_token_seconds_count{model_name="m"} 4.0
nsa_serve:request_time_per_output_token_seconds_sum{model_name="m"} 0.2
nsa_serve:request_time_per_output_token_seconds_count{model_name="m"} 2.0
"""
REPORTS = {
    BenchServe: ("report.json", {
        "completed": 4, "total_input_tokens": 40, "total_output_tokens": 20, "mean_ttft_ms": 100.0,
        "mean_tpot_ms": 10.0, "output_throughput": 50.0,
    }),
    # Beside TPOT in our sense it reports one with the TTFT in it.
    GuideLLM: ("report.json", {"benchmarks": [{
        "scheduler_metrics": {"requests_made": {"successful": 4}}, "metrics": {
        "prompt_token_count": {"successful": {"mean": 10.0}},
        "output_token_count": {"successful": {"mean": 5.0}},
        "time_to_first_token_ms": {"successful": {"mean": 100.0}},
        "inter_token_latency_ms": {"successful": {"mean": 10.0}},
        "time_per_output_token_ms": {"successful": {"mean": 28.0}},
        "output_tokens_per_second": {"successful": {"mean": 50.0}},
        "turns": None, "request_totals": {"total": 4},
    }}]}),
    AIPerf: ("profile_export_aiperf.json", {
        "request_count": {"avg": 4.0}, "input_sequence_length": {"avg": 10.0},
        "output_sequence_length": {"avg": 5.0}, "time_to_first_token": {"avg": 100.0},
        "inter_token_latency": {"avg": 10.0}, "output_token_throughput": {"avg": 50.0},
    }),
}  # fmt: skip


def programs() -> list[Tester]:
    return [BenchServe(), GuideLLM(["guidellm"]), AIPerf(["aiperf"])]


@pytest.mark.parametrize("tester", programs(), ids=lambda tester: tester.name)
def test_reports_are_read_by_our_definitions(tester, tmp_path):
    name, report = REPORTS[type(tester)]
    (tmp_path / name).write_text(json.dumps(report))
    assert tester.read(tmp_path) == Figures(4, 10.0, 5.0, 100.0, 10.0, 50.0)


@pytest.mark.parametrize("load", [RATE, CHAT], ids=str)
@pytest.mark.parametrize("tester", programs(), ids=lambda tester: tester.name)
def test_every_tester_is_told_of_the_whole_load(tester, load, tmp_path):
    site = Site("http://127.0.0.1:9", "m", tmp_path)
    command = tester.command(load, site, tmp_path / "prompts.jsonl", tmp_path)
    said = " ".join([*command, json.dumps(tester.row("a text", load))])
    pace = "1.9" if load.rate else "8"
    asked = [site.url, "prompts.jsonl", "80", pace, "16", "a text"]
    assert [word for word in asked if word not in said] == []
    assert ("chat" in said) == load.is_chat


@pytest.mark.parametrize("load", [RATE, CHAT], ids=str)
def test_our_own_command_is_one_that_there_is(load, tmp_path):
    site = Site("http://127.0.0.1:9", "m", tmp_path)
    parse(["bench", "serve", *BenchServe().arguments(load, site, tmp_path / "x", tmp_path)])


def test_the_servers_own_times_are_those_of_the_run():
    after = PAGE.replace('_sum{model_name="m"} 1.0', '_sum{model_name="m"} 1.5')
    after = after.replace("} 4.0", "} 9.0").replace("} 0.2", "} 0.8").replace("} 2.0", "} 4.0")
    ttft, tpot = ServerTimes.read(after).since(ServerTimes.read(PAGE))
    assert (ttft, tpot) == (pytest.approx(100.0), pytest.approx(300.0))


class Counter(Tester):
    """Counts the lines of its prompts, and leaves one out if told so."""

    name = "counter"

    def row(self, prompt: str, load: Load) -> dict[str, str]:
        return {"prompt": prompt}

    def arguments(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        return [str(prompts), str(out / "count")]

    def read(self, out: Path) -> Figures:
        return Figures(int((out / "count").read_text()), 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    pages = iter((PAGE, PAGE.replace("} 4.0", "} 5.0").replace("} 2.0", "} 3.0")))
    get = lambda url: httpx.Response(200, text=next(pages))  # noqa: E731
    monkeypatch.setattr(load_agreement.httpx, "get", get)
    site = Site("http://server", "m", tmp_path)
    write_tokenizer(site.tokenizer)
    return Trial(site)


def counter(less: int) -> Counter:
    code = f"import sys; a, b = sys.argv[1:]; n = len(open(a).readlines()) - {less}"
    return Counter([sys.executable, "-c", f"{code}; open(b, 'w').write(str(n))"])


SMALL = Load("/v1/completions", concurrency=1, num_requests=3, prompt_len=20)


def test_a_trial_hands_the_prompts_over_and_looks_at_the_server(trial, tmp_path):
    run = trial.run(counter(0), SMALL)
    assert (run.figures.completed, run.server_ttft, run.server_tpot) == (3, 0.0, 0.0)
    lines = (tmp_path / "1" / "prompts.jsonl").read_text().splitlines()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    lengths = [len(tokenizer.encode(json.loads(line)["prompt"]).ids) for line in lines]
    assert lengths == [20, 20, 20]


def test_a_tester_that_left_requests_out_is_no_measurement(trial):
    with pytest.raises(AssertionError, match="counter"):
        trial.run(counter(1), SMALL)


def test_a_tester_that_fails_is_shown_with_its_words(trial):
    broken = Counter([sys.executable, "-c", "raise SystemExit('no such flag')"])
    with pytest.raises(AssertionError, match="no such flag"):
        trial.run(broken, SMALL)


def test_each_tester_is_compared_with_ours_under_the_same_load():
    def run(tester: str, load: Load, ttft: float) -> Run:
        return Run(load, tester, Figures(4, 10.0, 5.0, ttft, 10.0, 50.0), ttft, 10.0)

    runs = [
        run(BenchServe.name, RATE, 90.0), run(BenchServe.name, RATE, 110.0),
        run(AIPerf.name, RATE, 106.0), run(BenchServe.name, CHAT, 50.0),
        run(AIPerf.name, CHAT, 49.0),
    ]  # fmt: skip
    found = {(row["load"], row["tester"]): row["difference"]["ttft"] for row in compare(runs)}
    assert found == {
        ("completions, 1.9/s", BenchServe.name): 0.0,
        ("completions, 1.9/s", AIPerf.name): pytest.approx(0.06),
        ("chat, 8 at a time", BenchServe.name): 0.0,
        ("chat, 8 at a time", AIPerf.name): pytest.approx(-0.02),
    }
