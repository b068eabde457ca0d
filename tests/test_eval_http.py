"""An evaluation gives the same through HTTP as in process; what a server can't do is told."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.errors import ConfigError, EvaluationStopped
from nsa_serve.evaluate import cli as room
from nsa_serve.evaluate.flags import NeedleFlags, parse_contexts
from nsa_serve.evaluate.haystack import Haystack, read_documents, sentences_of
from nsa_serve.evaluate.needle import NeedleGrid, run_needles
from nsa_serve.evaluate.over_http import OverHTTP, ServerAddress
from nsa_serve.evaluate.perplexity import Windows, run_perplexity
from nsa_serve.evaluate.record import Record
from nsa_serve.evaluate.subject import Question, Subject
from nsa_serve.server import cli
from tests.eval_served import ADDRESS, asked_both_ways
from tests.server_process import write_small_model

LENGTH = 4096


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """A model of bytes with random weights, in process and behind the server's own routes."""
    folder = write_small_model(tmp_path_factory.mktemp("model"))
    config = EngineConfig.from_flags(
        model=str(folder), random_weights=True, device="cpu", attention="nsa", dtype="float32",
        kv_cache_memory_bytes=16 << 20, max_model_len=LENGTH, max_num_batched_tokens=512,
    )  # fmt: skip
    with asked_both_ways(config) as both:
        yield both


def test_a_model_in_this_process_fills_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[EngineConfig] = []

    def build(config: EngineConfig) -> Any:
        built.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr(Engine, "from_config", build)
    with pytest.raises(ConfigError, match="far enough"), NeedleFlags(model=str(tmp_path)).subject():
        pass
    assert [config.schedule.interactive for config in built] == [False]


def results(subjects: dict[str, Subject], run: Callable[[Subject, str], Any]) -> list[Any]:
    return [run(subject, name) for name, subject in subjects.items()]


def test_needles_are_answered_alike(subjects: dict[str, Subject], tmp_path: Path) -> None:
    grid = NeedleGrid("late_speeches", contexts=(900,), num_depths=3, num_keys=1)
    sentences = sentences_of(read_documents("late_speeches", None))

    def run(subject: Subject, name: str) -> dict[str, Any]:
        record = Record.open(tmp_path / name, "needle", subject.description, grid.settings())
        run_needles(grid, subject, Haystack(sentences, subject), record, lambda count: None)
        return record.items

    through_http, in_process = results(subjects, run)
    assert through_http == in_process
    assert any(item["answer"] for item in in_process.values())
    for item in in_process.values():
        assert item["context"] / 2 < item["prompt_tokens"] <= item["context"]


def test_perplexity_is_alike(subjects: dict[str, Subject], tmp_path: Path) -> None:
    windows = Windows("late_speeches", contexts=(256, 1024), max_tokens=1024)
    (text, *_) = read_documents("late_speeches", None)

    def run(subject: Subject, name: str) -> dict[str, Any]:
        record = Record.open(tmp_path / name, "ppl", subject.description, windows.settings())
        tokens = subject.encode(text[:2000])
        run_perplexity(windows, subject, tokens, record, lambda count: None)
        return {key: item["nll"] for key, item in record.items.items()}

    through_http, in_process = results(subjects, run)
    assert len(in_process) == 5
    assert through_http == pytest.approx(in_process, abs=1e-6)


def test_the_context_is_the_servers(subjects: dict[str, Subject]) -> None:
    assert {subject.max_model_len for subject in subjects.values()} == {LENGTH}


def test_a_refused_request_stops_the_evaluation(subjects: dict[str, Subject]) -> None:
    with pytest.raises(EvaluationStopped, match=r"answered with 400.*maximum context length"):
        subjects["http"].answer([Question("word " * LENGTH, 8)])


def scripted(**replies: Any) -> httpx.Client:
    """A server with these replies by path, as (status, body) or what is raised."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = replies[request.url.path.rpartition("/")[2]]
        if isinstance(found, Exception):
            raise found
        return httpx.Response(found[0], json=found[1])

    transport = httpx.MockTransport(answer)
    return httpx.Client(transport=transport, base_url="http://test")


MODELS = (200, {"data": [{"id": "m"}, {"id": "other", "max_model_len": 9}]})


@pytest.mark.parametrize(
    ("models", "name", "words"),
    [
        (httpx.ConnectError("refused"), None, "no OpenAI API there"),
        ((404, {}), None, "no OpenAI API there"),
        ((200, {"data": [{}]}), None, "no OpenAI API there"),
        (MODELS, "absent", "no model 'absent'; it serves m, other"),
        ((200, {"data": []}), None, "no model None"),
    ],
)
def test_an_address_without_the_model_is_refused(models: Any, name: str | None, words: str) -> None:
    address = ServerAddress("http://test", name)
    with scripted(models=models) as client, pytest.raises(ConfigError, match=words):
        OverHTTP(address, client)


def test_a_server_that_says_no_context_may_be_asked_for_any() -> None:
    with scripted(models=MODELS) as client:
        assert OverHTTP(ADDRESS, client).max_model_len is None
        assert OverHTTP(ServerAddress("http://test", "other"), client).max_model_len == 9


@pytest.mark.parametrize("logprobs", [None, {}, {"token_logprobs": [None, -1.0]}])
def test_a_server_that_does_not_echo_logprobs_is_told_of(logprobs: Any) -> None:
    reply = (200, {"choices": [{"text": "a", "logprobs": logprobs}]})
    with scripted(models=MODELS, completions=reply) as client:
        subject = OverHTTP(ADDRESS, client)
        with pytest.raises(EvaluationStopped, match="does not echo"):
            subject.logprobs([[1, 2, 3]])


def test_a_server_that_goes_away_stops_the_evaluation() -> None:
    with scripted(models=MODELS, tokenize=httpx.ReadError("gone")) as client:
        subject = OverHTTP(ADDRESS, client)
        with pytest.raises(EvaluationStopped, match="/tokenize: gone"):
            subject.encode("a")


def test_a_server_without_tokenize_is_counted_for_by_a_tokenizer_here(tmp_path: Path) -> None:
    write_small_model(tmp_path)
    with scripted(models=MODELS) as client:
        subject = OverHTTP(ServerAddress("http://test", tokenizer=str(tmp_path)), client)
        assert len(subject.encode("abc")) == 3
        assert subject.count(["ab", ""]) == [2, 0]
        assert 3 < subject.count_chat("abc") < 200
        with pytest.raises(ConfigError, match=r"--tokenizer .*none"):
            OverHTTP(ServerAddress("http://test", tokenizer=str(tmp_path / "none")), client)


def test_contexts_are_lengths_with_or_without_k() -> None:
    assert parse_contexts("2k, 1000,64K,1000") == (1000, 2048, 65536)
    for wrong in ("", "0", "1m", "-4", "1k,,2k"):
        with pytest.raises(ConfigError, match="must be lengths"):
            parse_contexts(wrong)


def test_flags_of_an_engine_do_not_go_with_a_server() -> None:
    for flag, value in (("attention", "nsa"), ("ablate", "window")):
        given = NeedleFlags(url="http://127.0.0.1:1", **{flag: value}).subject()
        with pytest.raises(ConfigError, match=f"--{flag} is for a model in this process"), given:
            pass


@pytest.fixture
def invoke(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """The command line over the model that is loaded already."""
    monkeypatch.chdir(tmp_path)
    for flags in (room.NeedleFlags, room.PerplexityFlags, room.TaskFlags):
        monkeypatch.setattr(flags, "subject", lambda self: nullcontext(subjects["in process"]))
    return lambda *arguments: CliRunner().invoke(cli.app, ["eval", *arguments])


def test_each_command_writes_its_record(invoke: Callable[..., Any], tmp_path: Path) -> None:
    shown = invoke("needle", "--contexts", "1k", "--depths", "2", "--keys", "1")
    assert shown.exit_code == 0, shown.output
    assert "needles found: 0.0%" in shown.output
    assert (tmp_path / "eval-needle.png").read_bytes().startswith(b"\x89PNG")
    shown = invoke("ppl", "--contexts", "256,512", "--tokens", "512", "-o", "p.json")
    assert shown.exit_code == 0, shown.output
    assert json.loads((tmp_path / "p.json").read_text())["summary"]["by_context"]["512"]
    few = ("--contexts", "2k", "--samples", "1", "--task", "multi_key")
    assert invoke("tasks", *few).exit_code == 0
    assert "multi_key/2048/0" in json.loads((tmp_path / "eval-tasks.json").read_text())["items"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("needle", "--contexts", "8k"), "the model's context is 4096"),
        (("tasks", "--task", "chess"), "--task is one of multi_key"),
        (("ppl", "--text", "emma"), "needs the package r-cran-janeaustenr"),
        (("needle", "--contexts", "x"), "must be lengths"),
    ],
)
def test_what_can_not_be_evaluated_is_told_in_one_line(
    invoke: Callable[..., Any], arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_library_is_told_before_anything_runs(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke("needle", "--text", __file__, "--contexts", "1k")
    assert result.exit_code == 2
    assert "needs matplotlib" in result.stderr


def test_ctrl_c_keeps_what_there_is(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "run_needles", interrupt)
    assert invoke("needle", "--contexts", "1k").exit_code == room.INTERRUPTED


def test_help_of_an_evaluation_begins_with_its_own_flags(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = CliRunner().invoke(cli.app, ["eval", "tasks", "--help"]).output
    own, engine = text.index("--contexts"), text.index("--gpu-memory-utilization")
    assert own < text.index("--url") < engine
    assert "not country_facts" in text
