"""Every command in the documentation is run, or says why it can't be and is parsed."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from nsa_serve.bench.load import cli as load_cli
from nsa_serve.config import NSA_MODEL as MODEL
from nsa_serve.server import cli
from tests.doc_blocks import ROOT, Block, blocks, named_commands, words
from tests.scripted_api import Answer, ScriptedAPI
from tests.server_process import running, write_small_model
from tests.virtual_time import run_virtually

SHELL = tuple(blocks("bash", "console"))
PYTHON = tuple(blocks("python"))
RUN = [block for block in SHELL if block.reason is None]
# Prefixes of what needs no server and no bash of its own.
_SERVE, _BENCH, _EVAL = (["nsa-serve", name] for name in ("serve", "bench", "eval"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of the documentation's model by name; a fixed text stands in for its answers."""
    folder = write_small_model(tmp_path_factory.mktemp("model"))
    # A request without max_tokens runs to the end of the context.
    mock = ("--mock-engine", "10000", "--load-format", "dummy", "--max-model-len", "4096")
    with running(str(folder), "--served-model-name", MODEL, *mock) as process:
        yield process.url


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that commands of the documentation read."""
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "How long is a long question?"}, {"value": "As long."}]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": turns}] * 4))
    row = {"prompt": "Once upon a time", "output_tokens": 16}
    (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return tmp_path


def invoke(arguments: list[str]) -> None:
    """Run our own command line in this process."""
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.stderr}\n{result.exception!r}"


def serve(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take ``serve`` up to the engine's configuration."""
    taken = []
    room = importlib.import_module("nsa_serve.server.serve")
    monkeypatch.setattr(room, "serve", lambda flags: taken.append(flags.engine_config()) or 0)
    invoke(arguments)
    assert len(taken) == 1


def load(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a load test against scripted answers, on virtual time."""

    def script(number: int, body: dict[str, object]) -> Answer:
        count = body.get("max_tokens") or body["max_completion_tokens"]
        return Answer([0.05] + [0.005] * (min(int(str(count)), 8) - 1))

    async def scenario(make, clock):
        api = ScriptedAPI(script)
        try:
            return await make(clock, api.connect)
        finally:
            await api.close()

    monkeypatch.setattr(
        load_cli, "run_async", lambda make: run_virtually(lambda clock: scenario(make, clock))
    )
    invoke(arguments)


def shell(command: str, url: str) -> None:
    """Run a command in bash, with our own command line in its path and the server's address."""
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for host in ("127.0.0.1", "localhost"):
        command = command.replace(f"http://{host}:8000", url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=found, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not re.search(r'"error": ?\{', done.stdout), done.stdout


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_command_does_what_its_page_says(block, request, place, monkeypatch):
    for command in block.commands:
        found = words(command)
        if found[:2] == _SERVE:
            serve(found[1:], monkeypatch)
        elif found[:2] == _BENCH and found[2] in ("serve", "sweep"):
            load(found[1:], monkeypatch)
        elif found[:2] == _EVAL:
            url = request.getfixturevalue("server")
            invoke([word.replace("http://127.0.0.1:8000", url) for word in found[1:]])
        elif found[0] == "nsa-serve" and found[1] in ("plan", "collect-env"):
            invoke(found[1:])
        else:
            asks = ":8000" in command
            shell(command, request.getfixturevalue("server") if asks else "")


@pytest.mark.parametrize("block", [b for b in SHELL if b.reason], ids=str)
def test_a_command_that_is_not_run_says_why_and_can_be_parsed(block):
    assert len(block.reason) > 10
    for command in block.commands:
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)
        found = words(command)
        if "nsa-serve" in found[:1]:
            parse(found[1:])


def parse(arguments: list[str]) -> None:
    """Flags and values of one of our commands, or the name of a group, without running it."""
    command, rest = typer.main.get_command(cli.app), arguments
    while isinstance(command, typer.core.TyperGroup):
        if not rest:
            return
        context = command.make_context("nsa-serve", [], resilient_parsing=True)
        _, command, rest = command.resolve_command(context, rest)
    command.make_context(arguments[0], list(rest))


@pytest.mark.parametrize(("page", "found"), list(named_commands()), ids=str)
def test_a_command_named_in_a_sentence_is_one_that_there_is(page, found):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if found[0] == "nsa-serve":
        parse([word for word in found[1:] if word != "--help"])
    elif found[0] == "make":
        assert f"\n{found[1]}: " in (ROOT / "Makefile").read_text()
    elif found[0] == "python":
        assert importlib.util.find_spec(found[2]) is not None
    elif extra := re.search(r"\[(\w+)\]", found[-1]):
        assert extra[1] in project["optional-dependencies"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_example_runs(block, request, place, monkeypatch, capsys):
    if block.reason:
        compile(block.body, str(block), "exec")
        return
    url = request.getfixturevalue("server")
    source = block.body.replace("http://127.0.0.1:8000", url)
    names = {"__name__": "__main__"}
    exec(compile(source, str(block), "exec"), names)
    assert capsys.readouterr().out
    if "client" in names:
        names["client"].close()


EXAMPLES = sorted((ROOT / "examples").glob("*.*"))


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.suffix == ".py"], ids=lambda path: path.name
)
def test_an_example_in_python_runs(path, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    assert "failed" not in printed


def test_the_example_in_curl_runs(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    shell(f"{ROOT}/examples/curl.sh", server)


def test_the_example_of_a_batch_runs(tmp_path):
    model = write_small_model(tmp_path)
    shell(f"{ROOT}/examples/batch.sh {model} --mock-engine 1000 --load-format dummy", "")


def test_every_example_is_told_of():
    told = re.findall(r"^\| `([^`]+)`", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(path.name for path in EXAMPLES if path.name != "README.md")


@pytest.mark.parametrize("block", list(blocks("yaml", "json", "toml")), ids=str)
def test_a_file_that_is_shown_can_be_read(block):
    if block.language == "json":
        json.loads(block.body)
    elif block.language == "yaml":
        assert yaml.safe_load(block.body)
    else:
        tomllib.loads(block.body)


@pytest.mark.parametrize("block", list(blocks("")), ids=str)
def test_a_block_without_a_language_is_a_picture(block):
    assert not re.search(
        r"^(\$ |nsa-serve |curl |pip |python |make |docker )", block.body, re.MULTILINE
    )


def test_commands_are_joined_and_their_output_is_left_out():
    body = "$ echo 'a\nb' \\\n  c\nsaid\n$ cat <<X\nhi\nX\nhi\n"
    assert Block("p", 1, "console", body, None).commands == [
        "echo 'a\nb' \\\n  c", "cat <<X\nhi\nX",
    ]  # fmt: skip
    assert Block("p", 1, "bash", "# x\necho a\n\necho b # y\n", None).commands == [
        "echo a", "echo b # y",
    ]  # fmt: skip


@functools.cache
def messages() -> str:
    """Every string of the sources, what is put into it written as …"""
    rooms = [ROOT / room for room in ("nsa_serve", "server", "bench")]
    found = []
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(getattr(v, "value", "…")) if isinstance(v, ast.Constant)
                                     else "…" for v in node.values))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def headings() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^### `(.+)`$", text, re.MULTILINE)


def test_troubleshooting_tells_of_many_messages():
    assert len(headings()) >= 20


@pytest.mark.parametrize("heading", headings())
def test_a_message_that_is_explained_is_one_that_the_program_has(heading):
    assert heading in messages()


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart" / "index.html").is_file()


def test_metrics_that_are_documented_are_those_that_there_are(server):
    page = importlib.import_module("httpx").get(f"{server}/metrics").text
    served = set(re.findall(r"^# TYPE (nsa_serve:\w+)(?<!_created) ", page, re.MULTILINE))
    text = (ROOT / "docs" / "metrics.md").read_text()
    told = {f"nsa_serve:{name}" for name in re.findall(r"^\| `(\w+)", text, re.MULTILINE)}
    assert served == told, (served - told, told - served)
