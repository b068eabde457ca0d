"""The server as a process: how it starts, drains, is cut short, and ends with its engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager

import httpx
import pytest

from tests.server_process import COMMAND, running, write_small_model

LONG = 60_000  # tokens; more than any test waits for


@pytest.fixture
def small_server(tmp_path):
    folder = write_small_model(tmp_path)
    flags = ("--load-format", "dummy", "--dtype", "float32", "--kv-cache-memory-bytes", "64M")
    with running(str(folder), "--served-model-name", "small", *flags) as server:
        yield server


@contextmanager
def streaming(server, max_tokens):
    """A stream that has begun: gives an iterator over what follows its first event."""
    body = {"prompt": "Once", "stream": True, "ignore_eos": True, "max_tokens": max_tokens}
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        events = (line for line in response.iter_lines() if line.startswith("data: "))
        next(events)
        yield events


def test_a_signal_lets_what_runs_finish_and_nothing_in(small_server):
    with streaming(small_server, 1000) as events:
        small_server.signal(signal.SIGTERM)
        for _ in range(200):
            next(events)
        refused = httpx.post(f"{small_server.url}/v1/completions", json={"prompt": "a"})
        ready = httpx.get(f"{small_server.url}/ready")
        *_, last, done = events
    assert (refused.status_code, ready.status_code) == (503, 503)
    assert int(refused.headers["retry-after"]) > 0
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert small_server.wait() == 0


def test_a_second_signal_ends_it_at_once(small_server):
    with streaming(small_server, LONG) as events:
        small_server.signal(signal.SIGTERM)
        for _ in range(200):
            next(events)
        small_server.signal(signal.SIGTERM)
        *_, last, done = events
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "overloaded"
    assert done == "data: [DONE]"
    assert small_server.wait() == 1


def test_when_the_engine_is_killed_streams_get_an_error_and_the_server_ends(small_server):
    with streaming(small_server, LONG) as events:
        os.kill(small_server.engine_pid(), signal.SIGKILL)
        *_, last, done = events
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert done == "data: [DONE]"
    assert small_server.wait() == 1


def _refused(*arguments):
    """Exit code and the lines that this program wrote of a start that must fail."""
    result = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("nsa-serve:")]
    return line


def test_a_missing_checkpoint_is_refused_in_a_line_that_names_it(tmp_path):
    assert str(tmp_path / "nothing") in _refused(str(tmp_path / "nothing"))


def test_an_unsupported_checkpoint_is_refused_in_a_line_that_names_the_key(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    line = _refused(str(tmp_path), "--load-format", "dummy")
    assert "mamba" in line
    assert "model_type" in line
