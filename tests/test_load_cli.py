"""``bench serve`` and ``bench sweep`` from end to end, on virtual time, against scripts."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from typer.testing import CliRunner

from nsa_serve.bench.load import cli
from nsa_serve.server.cli import app
from tests.scripted_api import MODEL, Answer, ScriptedAPI
from tests.virtual_time import run_virtually

GAUGES = (
    'nsa_serve:num_requests_running{model_name="m"} RUNNING\n'
    'nsa_serve:num_requests_waiting{model_name="m"} 0.0\n'
)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench(api, *arguments) gives (the command's result, its JSON file's content if any)."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(api, *arguments, code=0):
        async def scenario(make, clock):
            try:
                return await make(clock, api.connect)
            finally:
                await api.close()

        monkeypatch.setattr(
            cli, "run_async", lambda make: run_virtually(lambda clock: scenario(make, clock))
        )
        where = ("--result-dir", str(tmp_path))
        result = CliRunner().invoke(app, ["bench", *arguments, *where])
        assert result.exit_code == code, (result.output, result.exception)
        files = list(tmp_path.glob("*.json"))
        return result, json.loads(files[0].read_text()) if files else None

    return run


def steady(number, body):
    """First token after 0.5 s, then one every 0.1 s, as many as were asked for."""
    return Answer([0.5] + [0.1] * (body.get("max_tokens", body.get("max_completion_tokens")) - 1))


SMALL = ("--num-prompts", "8", "--random-input-len", "20", "--random-output-len", "11")


def test_a_run_measures_what_the_server_did(bench, tmp_path):
    api = ScriptedAPI(steady, metrics=GAUGES)
    result, saved = bench(
        api, "serve", *SMALL, "--max-concurrency", "2", "--save-result", "--plot",
        "--goodput", "ttft:600", "tpot:150", "--metadata", "card=none", "--num-warmups", "3",
    )  # fmt: skip
    # Eight answers of 1.5 s, two at a time.
    assert saved["duration"] == pytest.approx(6.0)
    assert (saved["completed"], saved["failed"], saved["max_concurrent_requests"]) == (8, 0, 2)
    assert (saved["total_input_tokens"], saved["total_output_tokens"]) == (160, 88)
    assert [saved["mean_ttft_ms"], saved["p99_ttft_ms"]] == pytest.approx([500.0, 500.0])
    assert [saved["mean_tpot_ms"], saved["median_itl_ms"]] == pytest.approx([100.0, 100.0])
    assert saved["p99_e2el_ms"] == pytest.approx(1500.0)
    assert saved["std_e2el_ms"] == pytest.approx(0.0, abs=1e-6)
    assert saved["output_throughput"] == pytest.approx(88 / 6)
    assert saved["request_goodput"] == saved["request_throughput"] == pytest.approx(8 / 6)
    assert (saved["model_id"], saved["request_rate"], saved["card"]) == (MODEL, "inf", "none")
    assert len(api.bodies) == 11
    assert "P99" in result.stdout.upper()
    names = {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")}
    assert names == {"ttft.png", "itl.png", "timeline.png"}
    assert "itls" not in saved


def test_warm_ups_and_runs_ask_different_texts(bench):
    api = ScriptedAPI(steady)
    bench(api, "serve", *SMALL, "--num-warmups", "3")
    assert len({body["prompt"] for body in api.bodies}) == 11


def test_arrivals_keep_their_times(bench):
    api = ScriptedAPI(lambda number, body: Answer([0.25]))
    _, saved = bench(
        api, "serve", *SMALL, "--request-rate", "2", "--burstiness", "inf", "--save-detailed"
    )
    assert saved["start_times"] == pytest.approx([0.5 * (i + 1) for i in range(8)])
    assert saved["p99_client_lag_ms"] == pytest.approx(0.0, abs=1e-6)
    assert saved["duration"] == pytest.approx(4.25)


def test_a_conversation_carries_its_answers(bench):
    api = ScriptedAPI(steady)
    _, saved = bench(
        api, "serve", "--backend", "openai-chat", "--dataset-name", "conversation",
        "--num-prompts", "3", "--conversation-turns", "3", "--conversation-system-len", "9",
        "--random-input-len", "20", "--random-output-len", "2", "--conversation-think-time", "10",
        "--save-detailed",
    )  # fmt: skip
    assert saved["start_times"] == pytest.approx([0.0, 10.6, 21.2])
    roles = [message["role"] for message in api.bodies[2]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert api.bodies[2]["messages"][2]["content"] == " w w"
    assert api.bodies[2]["messages"][:4] == api.bodies[1]["messages"]


def test_failures_are_counted_and_told(bench):
    def script(number, body):
        return Answer([], status=503, message="full") if number % 4 == 0 else steady(number, body)

    result, saved = bench(ScriptedAPI(script), "serve", *SMALL, "--save-result")
    assert (saved["completed"], saved["failed"]) == (6, 2)
    assert saved["error_counts"] == {"HTTP 503: full": 2}
    assert "2 × HTTP 503: full" in result.output


def test_the_code_tells_when_no_request_was_answered(bench):
    api = ScriptedAPI(lambda number, body: Answer([], status=500, message="broken"))
    bench(api, "serve", *SMALL, code=1)


def test_a_warm_up_that_fails_ends_the_run_with_its_reason(bench):
    api = ScriptedAPI(lambda number, body: Answer([], status=400, message="no such model"))
    result, _ = bench(api, "serve", *SMALL, "--num-warmups", "1", code=2)
    assert "a warm-up request failed: HTTP 400: no such model" in result.stderr


@pytest.fixture
def interruptible():
    """Ctrl-C as a new process has it, whatever servers ran in this one before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_prints_and_saves_what_was_measured(bench):
    def script(number, body):
        if number == 5:
            signal.raise_signal(signal.SIGINT)  # in this thread, so before the next step
        return steady(number, body)

    _, saved = bench(
        ScriptedAPI(script), "serve", *SMALL, "--request-rate", "1", "--burstiness", "inf",
        "--save-result", code=130,
    )  # fmt: skip
    assert saved["completed"] + saved["interrupted"] == 6
    assert saved["interrupted"] >= 1
    assert saved["p99_ttft_ms"] == pytest.approx(500.0)


def test_results_can_be_added_to_one_file(bench, tmp_path):
    for _ in range(2):
        bench(
            ScriptedAPI(steady), "serve", *SMALL, "--append-result",
            "--result-filename", "all.jsonl",
        )  # fmt: skip
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [8, 8]


def test_keys_headers_and_sampling_reach_the_server(bench):
    api = ScriptedAPI(steady)
    bench(
        api, "serve", *SMALL, "--api-key", "k", "--header", "x-tenant=a", "--temperature", "0",
        "--ignore-eos", "--extra-body", '{"min_tokens": 3}',
    )  # fmt: skip
    assert all("authorization: Bearer k\r\nx-tenant: a\r\n" in head for head in api.heads)
    assert all(
        (body["temperature"], body["ignore_eos"], body["min_tokens"]) == (0, True, 3)
        for body in api.bodies
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--backend", "grpc"), "--backend"),
        (("--endpoint", "/generate"), "--endpoint"),
        (("--base-url", "server:1"), "--base-url"),
        (("--request-rate", "0"), "--request-rate"),
        (("--burstiness", "0"), "--burstiness"),
        (("--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (
            ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "2",
             "--request-rate", "5"),
            "leave --request-rate out",
        ),
        (("--goodput", "itl:5"), "--goodput itl:5"),
        (("nonsense",), "--goodput nonsense"),
        (("--header", "x"), "--header"),
        (("--extra-body", "{"), "--extra-body"),
        (("--extra-body", "[]"), "--extra-body"),
        (("--percentile-metrics", "ttft,x"), "--percentile-metrics"),
        (("--metric-percentiles", "101"), "--metric-percentiles"),
        (("--dataset-name", "custom"), "--dataset-path"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_in_one_line_before_any_request(bench, arguments, found):
    api = ScriptedAPI(steady)
    result, _ = bench(api, "serve", *SMALL, *arguments, code=2)
    assert found in result.stderr
    assert result.stderr.count("\n") == 1
    assert not api.bodies


def test_a_server_that_is_not_there_is_told(monkeypatch):
    wanted = ("serve", "--port", "1", "--ready-check-timeout-sec", "0")
    result = CliRunner().invoke(app, ["bench", *wanted])
    assert result.exit_code == 2
    assert "no server answers at http://127.0.0.1:1/v1/models" in result.stderr


def test_pictures_without_their_library_are_refused_before_the_run(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    api = ScriptedAPI(steady)
    result, _ = bench(api, "serve", *SMALL, "--plot", code=2)
    assert "nsa-serve[bench]" in result.stderr
    assert not api.bodies


def queueing(seconds):
    """A server of one request at a time, each taking so long; the rest wait for it."""
    free_at = [0.0]

    def script(number, body):
        now = asyncio.get_running_loop().time()
        start = max(now, free_at[0])
        free_at[0] = start + seconds
        return Answer([start + seconds - now])

    return script


ONE_TOKEN = ("--random-input-len", "20", "--random-output-len", "1", "--burstiness", "inf")


def test_a_sweep_finds_the_rate_that_keeps_the_limits(bench, tmp_path):
    api = ScriptedAPI(queueing(0.1))
    result, saved = bench(
        api, "sweep", *ONE_TOKEN, "--step-seconds", "6", "--goodput", "ttft:300", "--plot",
        "--num-warmups", "1",
    )  # fmt: skip
    # Ten requests a second can be served. Of sixty at rate r the last waits 60 · (1/10 − 1/r),
    # which is the 200 ms allowed beside its own 100 at 10.3.
    assert saved["highest_rate_within_limits"] == pytest.approx(10.3, rel=0.06)
    assert saved["max_output_throughput"] == pytest.approx(10.0, rel=0.06)
    assert saved["limits_ms"] == {"ttft": 300.0}
    rates = [step["request_rate"] for step in saved["steps"]]
    assert rates[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert "highest rate with p99 ttft ≤ 300 ms" in result.output
    assert [path.name.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")] == ["sweep.png"]


def test_a_sweep_without_limits_ends_at_saturation_and_shows_the_knee(bench):
    api = ScriptedAPI(queueing(0.1))
    _, saved = bench(api, "sweep", *ONE_TOKEN, "--step-seconds", "4", "--num-warmups", "0")
    assert [step["request_rate"] for step in saved["steps"]] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert saved["knee_rate"] in (8.0, 16.0)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--start-rate", "0"), "--start-rate"),
        (("--precision", "1"), "--precision"),
        (("--metric-percentiles", "50"), "--metric-percentiles must have 99"),
        (("--percentile-metrics", "itl"), "--percentile-metrics must have"),
    ],
)
def test_a_sweep_that_could_not_judge_is_refused(bench, arguments, found):
    result, _ = bench(ScriptedAPI(steady), "sweep", *SMALL, *arguments, code=2)
    assert found in result.stderr


def test_a_local_tokenizer_that_is_none_is_refused(bench, tmp_path):
    result, _ = bench(ScriptedAPI(steady), "serve", *SMALL, "--tokenizer", str(tmp_path), code=2)
    assert "--tokenizer" in result.stderr
