"""Batch files: bounded lines in, whole lines out, resumed after whatever happened."""

from __future__ import annotations

import asyncio
import errno
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nsa_serve.errors import BatchStopped, ConfigError, Overloaded
from nsa_serve.server import cli
from nsa_serve.server.batch.lines import BadLine, BatchRequest, count_lines, read_lines
from nsa_serve.server.batch.results import ResultFile
from nsa_serve.server.batch.run import answer_all, batch_lines
from tests.server_fakes import fake_server
from tests.server_process import write_small_model

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def line(custom_id, url=CHAT, body=BODY, **fields):
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **fields}
    )


def read(text, max_bytes=1000):
    return list(read_lines(io.BytesIO(text.encode()), max_bytes))


def entries(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


class Run:
    """Batches over the fake engine, into one output file."""

    def __init__(self, folder):
        self.output = folder / "out.jsonl"
        self.answered = []

    def __call__(self, *lines, change=None, at_once=4):
        """Answer the lines as a new run does; the engine's requests."""

        async def scenario():
            async with fake_server() as server:
                if change is not None:
                    change(server)
                file = io.BytesIO("\n".join(lines).encode())
                with ResultFile(self.output) as results:
                    todo = batch_lines(file, server.services.settings, results)
                    app = server.client._transport.app
                    await answer_all(app, todo, results, self.answered.append, at_once=at_once)
                return server.engine.requests

        return asyncio.run(scenario())

    @property
    def by_id(self):
        found = {entry["custom_id"]: entry for entry in entries(self.output)}
        assert len(found) == len(entries(self.output))
        return found


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_every_route_answers_in_openais_form(run):
    run(
        line("a"),
        line("b", "/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        line("c", "/v1/responses", {"input": "Hi"}),
    )
    kinds = {key: entry["response"]["body"]["object"] for key, entry in run.by_id.items()}
    assert kinds == {"a": "chat.completion", "b": "text_completion", "c": "response"}
    for entry in run.by_id.values():
        assert entry["id"].startswith("batch_req_")
        assert (entry["response"]["status_code"], entry["error"]) == (200, None)
        assert entry["response"]["request_id"]
    assert run.by_id["a"]["response"]["body"]["choices"][0]["message"]["content"] == "Hi é!"
    assert run.answered == [False] * 3


def test_a_request_that_fails_has_its_error_and_the_others_their_answers(run):
    run(line("a", body={}), line("b"), line("c", body={**BODY, "model": "gpt-5"}))
    refused = run.by_id["a"]
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["param"] == "messages"
    assert refused["error"]["code"] == "invalid_request_error"
    assert run.by_id["c"]["error"]["code"] == "model_not_found"
    assert run.by_id["b"]["error"] is None


BAD = [
    ("{", None, "invalid_json_line"),
    ("[]", None, "invalid_json_line"),
    ('{"custom_id": 3, "url": "x", "body": {}}', None, "invalid_json_line"),
    ('{"custom_id": "a", "url": "/v1/chat/completions"}', None, "invalid_json_line"),
    ('{"custom_id": "a", "url": "/v1/completions", "body": {"x": }}', None, "invalid_json_line"),
    (line("", CHAT), "", "invalid_custom_id"),
    (line("x" * 600, CHAT), "x" * 512, "invalid_custom_id"),
    (line("a", "/v1/embeddings"), "a", "invalid_url"),
    (line("a", method="GET"), "a", "invalid_method"),
    (line("a", body={**BODY, "stream": True}), "a", "invalid_request"),
    ("x" * 1001, None, "line_too_long"),
]


@pytest.mark.parametrize(("text", "custom_id", "code"), BAD)
def test_a_line_that_can_not_be_asked_is_told_by_its_number(text, custom_id, code):
    good = line("good")
    first, bad, last = read(f"{good}\n\n{text}\n{line('last')}")
    assert isinstance(first, BatchRequest)
    assert (bad.number, bad.custom_id, bad.code) == (3, custom_id, code)
    assert (last.number, last.custom_id) == (4, "last")


def test_an_id_that_comes_again_is_refused():
    _, again, _ = read("\n".join((line("a"), line("a"), line("b"))))
    assert again == BadLine(2, "a", "duplicate_custom_id", again.message)


def test_a_line_that_never_ends_is_not_held():
    class Endless(io.RawIOBase):
        """A first line of 100 MB, then a good one; knows the most that was asked for at once."""

        def __init__(self):
            self.left = 100 << 20
            self.rest = io.BytesIO(b"\n" + line("a").encode())
            self.largest = 0

        def seek(self, *_):
            return 0

        def readline(self, size=-1):
            self.largest = max(self.largest, size)
            assert size >= 0
            if self.left:
                taken = min(size, self.left)
                self.left -= taken
                return b"x" * taken
            return self.rest.readline(size)

    file = Endless()
    long, good = read_lines(file, 5000)
    assert (long.code, good.custom_id, good.number) == ("line_too_long", "a", 2)
    assert file.largest <= 1 << 20


@given(st.lists(st.sampled_from(["", " ", "{}", "x" * 50, line("a"), line("b")]), max_size=8))
def test_lines_are_counted_without_blank_ones(lines):
    text = "\n".join(lines)
    expected = sum(bool(each.strip()) for each in lines)
    assert count_lines(io.BytesIO(text.encode())) == len(read(text, 30)) == expected


def test_a_second_run_asks_only_what_has_no_answer(run):
    lines = [line("a"), "{", line("b", body={}), line("b")]
    assert len(run(*lines)) == 1
    before = run.output.read_bytes()
    assert run(*lines, line("new")) != []
    assert run.output.read_bytes().startswith(before)
    added = entries(run.output)[4:]
    assert [entry["custom_id"] for entry in added] == ["new"]


@pytest.mark.parametrize("cut", [1, 10, 30, 200])
def test_a_torn_last_line_is_answered_again(run, cut):
    run(line("a"), line("b"), at_once=1)
    first, second = run.output.read_bytes().splitlines(keepends=True)
    run.output.write_bytes(first + second[:cut])
    asked = run(line("a"), line("b"))
    assert len(asked) == 1
    assert list(run.by_id) == ["a", "b"]
    assert run.output.read_bytes().startswith(first)


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"id": "batch_req_x"}\n', '{"a": 1}'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        ResultFile(path)
    assert path.read_text() == text


def test_two_runs_do_not_write_to_one_file(tmp_path):
    with ResultFile(tmp_path / "out"), pytest.raises(ConfigError, match="another run"):
        ResultFile(tmp_path / "out")
    with ResultFile(tmp_path / "out"):
        pass


def test_a_full_disk_ends_the_run_and_loses_no_line(run, monkeypatch):
    run(line("a"))
    before = run.output.read_bytes()
    write = os.write

    def full(file, data):
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(BatchStopped, match=r"No space left on device.*same command again"):
            run(line("a"), line("b"), line("c"))
    assert run.output.read_bytes() == before
    run(line("a"), line("b"), line("c"))
    assert sorted(run.by_id) == ["a", "b", "c"]


def test_an_engine_that_dies_ends_the_run_and_nothing_false_is_written(run):
    def die(server):
        server.engine.dead = True

    with pytest.raises(BatchStopped, match="engine process ended"):
        run(*(line(str(i)) for i in range(20)), change=die)
    assert run.output.read_bytes() == b""


def test_what_the_engine_is_too_busy_for_is_asked_again(run):
    def be_busy(server):
        submit = server.engine.submit
        refusals = iter(range(2))

        async def busy(request, sink=None):
            if next(refusals, None) is not None:
                raise Overloaded("full", retry_after=0)
            async for output in submit(request, sink):
                yield output

        server.engine.submit = busy

    run(line("a"), change=be_busy)
    assert run.by_id["a"]["response"]["status_code"] == 200


def test_no_more_lines_are_open_than_wanted(run):
    num_open = most = 0
    together = asyncio.Barrier(3)

    def watch(server):
        submit = server.engine.submit

        async def counted(request, sink=None):
            nonlocal num_open, most
            num_open += 1
            most = max(most, num_open)
            # Each waits for two others, so that three must be open at once.
            await together.wait()
            async for output in submit(request, sink):
                yield output
            num_open -= 1

        server.engine.submit = counted

    run(*(line(str(i)) for i in range(30)), change=watch, at_once=3)
    assert most == 3
    assert len(run.by_id) == 30


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-i", "missing", "-o", "out"), "--input-file missing: No such file"),
        (("-i", "in", "-o", "no/out"), "--output-file no/out: No such file"),
        (("-i", "in", "-o", "in"), "are the same file"),
        (("-i", "in", "-o", "out", "--kv-cache-dtype", "fp8"), "--kv-cache-dtype fp8"),
    ],
)
def test_what_can_not_be_run_is_told_in_one_line(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("in").touch()
    result = CliRunner().invoke(cli.app, ["run-batch", *arguments])
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_fills_its_steps_since_nobody_waits_for_single_tokens(tmp_path, monkeypatch):
    configs = []

    async def refuse(config):
        configs.append(config)
        raise ConfigError("far enough")

    room = importlib.import_module("nsa_serve.server.batch.run")
    monkeypatch.setattr(room, "start_engine", refuse)
    (tmp_path / "in").write_text(line("a"))
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    CliRunner().invoke(cli.app, ["run-batch", *arguments])
    assert [config.schedule.interactive for config in configs] == [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, monkeypatch, number):
    async def never(config):
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    room = importlib.import_module("nsa_serve.server.batch.run")
    monkeypatch.setattr(room, "start_engine", never)
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(line("a"))
    result = CliRunner().invoke(cli.app, ["run-batch", "-i", str(source), "-o", str(target)])
    assert result.exit_code == 2
    assert result.stderr.startswith("nsa-serve: stopped. What was answered is kept")


def test_the_command_resumes_a_file_and_stops_where_the_disk_is_full(tmp_path):
    model = write_small_model(tmp_path)
    lines = [
        line(f"line {i}", "/v1/completions", {"prompt": "ab", "max_tokens": 3}) for i in range(5)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = (
        *(sys.executable, "-m", "nsa_serve.server.cli", "run-batch", str(model)),
        *("--load-format", "dummy", "--device", "cpu", "--dtype", "float32"),
        *("--kv-cache-memory-bytes", "16M", "--max-num-seqs", "1"),
        *("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")),
    )

    def start(limit):
        def bound():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, env=environment, preexec_fn=bound, capture_output=True, text=True, timeout=120
        )

    output = tmp_path / "out.jsonl"
    stopped = start(1200)
    assert stopped.returncode == 2, stopped.stderr
    assert "File too large. What was answered is kept" in stopped.stderr
    kept = entries(output)
    assert 0 < len(kept) < 5
    output.write_bytes(output.read_bytes() + b'{"id": "batch_req_torn')
    done = start(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    assert (
        f"{5 - len(kept)} lines answered, 0 of them with an error; {len(kept)} were" in done.stderr
    )
    assert entries(output)[: len(kept)] == kept
    assert sorted(entry["custom_id"] for entry in entries(output)) == [
        f"line {i}" for i in range(5)
    ]
    assert all(entry["response"]["body"]["usage"]["completion_tokens"] for entry in entries(output))
