"""The command line: what flags mean, what is refused in one line, what a person reads."""

from __future__ import annotations

import importlib
import logging
import socket
import subprocess
import sys
import types
from io import StringIO

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nsa_serve.config import (
    EMBEDDED_MODEL,
    AttentionMode,
    DType,
    EngineConfig,
    Policy,
    default_model,
)
from nsa_serve.engine.messages import EngineDescription
from nsa_serve.errors import CheckpointError, ConfigError
from nsa_serve.server import cli
from nsa_serve.server.flags import ServeFlags, parse_bytes
from nsa_serve.server.log_format import LogFormat, configure_logging
from nsa_serve.server.serve import is_loopback, ready_line, untrained_line
from nsa_serve.server.settings import ReasoningParser, ToolCallParser
from nsa_serve.server.startup import loading_bar, server_settings

serve_room = importlib.import_module("nsa_serve.server.serve")


@pytest.fixture
def parsed(monkeypatch):
    """Run ``serve`` up to its flags: parsed(*arguments) gives (flags or None, result)."""
    taken = []
    monkeypatch.setattr(serve_room, "serve", lambda flags: taken.append(flags) or 0)

    def parse(*arguments):
        result = CliRunner().invoke(cli.app, ["serve", *arguments])
        return (taken.pop() if taken else None), result

    return parse


def refusal(*arguments):
    """Exit code and message of a command that must be refused in one line."""
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def description(**fields):
    known = {
        "model_name": "m", "family": "llama", "attention": "nsa", "trained_sparse": False,
        "dtype": "bfloat16", "device": "cpu", "num_layers": 2, "vocab_size": 100,
        "max_model_len": 8192, "page_size": 64, "num_blocks": 1000, "token_budget": 512,
        "bos_token_id": 1, "eos_token_ids": (2,), "generation_config": {}, "tokenizer": None,
    }  # fmt: skip
    return EngineDescription(**{**known, **fields})


def test_without_flags_the_packages_model_is_served_on_this_machine_only(parsed):
    flags, _ = parsed()
    config = flags.engine_config()
    assert config.source.model == default_model()
    assert (flags.host, flags.port) == ("127.0.0.1", 8000)
    assert config.source.attention is AttentionMode.AUTO


def test_what_no_flag_says_is_what_the_configuration_says(parsed):
    flags, _ = parsed("org/m")
    assert flags.engine_config() == EngineConfig.from_flags(model="org/m")


@pytest.mark.parametrize("flag", ["--kv-cache-memory-bytes", "--cpu-offload-bytes"])
def test_a_size_that_is_no_number_is_told_with_its_flag(parsed, flag):
    flags, _ = parsed("org/m", flag, "lots")
    with pytest.raises(ConfigError, match=f"{flag}: 'lots' is no number of bytes"):
        flags.engine_config()


def test_a_benchmark_of_an_unknown_shape_is_refused_in_one_line():
    result = CliRunner().invoke(cli.app, ["bench", "latency", "--shape", "9z", "--device", "cpu"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("nsa-serve: --shape 9z: no such folder")


def test_every_flag_reaches_the_configuration(parsed):
    flags, result = parsed(
        *("org/m", "--served-model-name", "a", "--served-model-name", "b", "--dtype", "float32"),
        *("--attention", "nsa", "--max-model-len", "512", "--kv-cache-memory-bytes", "1.5GiB"),
        *("--no-enable-prefix-caching", "--scheduling-policy", "priority", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "64", "--max-num-queued-reqs", "9", "--device", "cpu"),
        *("--max-num-queued-tokens", "99", "--enforce-eager", "--deterministic", "--seed", "7"),
        *("--load-format", "dummy", "--tokenizer", "t", "--revision", "r"),
        *("--chat-template", "c", "--gpu-memory-utilization", "0.5"),
    )
    assert result.exit_code == 0, result.output
    config = flags.engine_config()
    source, cache, schedule = config.source, config.cache, config.schedule
    assert (source.model, source.public_name, source.dtype) == ("org/m", "a", DType.FLOAT32)
    assert (source.attention, source.max_model_len, source.seed) == (AttentionMode.NSA, 512, 7)
    assert (source.tokenizer, source.revision, source.chat_template) == ("t", "r", "c")
    assert source.random_weights
    assert cache.kv_cache_memory_bytes == 3 << 29
    assert (cache.enable_prefix_caching, cache.gpu_memory_utilization) == (False, 0.5)
    assert (schedule.policy, schedule.max_num_seqs) == (Policy.PRIORITY, 8)
    assert (schedule.max_num_queued_reqs, schedule.max_num_queued_tokens) == (9, 99)
    assert schedule.max_num_batched_tokens == 64
    assert (config.graph.enforce_eager, config.graph.deterministic) == (True, True)
    assert config.device == "cpu"


def test_a_file_gives_flags_and_the_command_line_goes_before_it(parsed, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: org/m\nport: 9000\nmax_num_seqs: 4\nenforce-eager: true\n"
        "enable-prefix-caching: false\napi-key: [a, b]\n"
    )
    flags, result = parsed("--config", str(path), "--port", "9001")
    assert result.exit_code == 0, result.output
    assert (flags.model, flags.port, flags.max_num_seqs) == ("org/m", 9001, 4)
    assert (flags.enforce_eager, flags.prefix_caching) == (True, False)
    assert list(flags.api_key) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("frobnicate: 1\n", "frobnicate"), ("- 1\n", "must map"), ("a: [", "can't be read")],
)
def test_a_file_that_can_not_be_used_is_refused(parsed, tmp_path, text, found):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    flags, result = parsed("--config", str(path))
    assert (flags, result.exit_code) == (None, 2)
    assert result.stderr.count("\n") == 1
    assert found in result.stderr


def test_a_missing_file_is_refused(parsed, tmp_path):
    flags, result = parsed("--config", str(tmp_path / "none.yaml"))
    assert (flags, result.exit_code) == (None, 2)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--tensor-parallel-size", "2"), "--tensor-parallel-size"),
        (("--kv-cache-dtype", "fp8"), "--kv-cache-dtype fp8 is not built"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--max-num-batched-tokens", "8"), "--max-num-batched-tokens 8"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization"),
        (("--device", "tpu"), "--device"),
        (("--load-format", "pickle"), "--load-format"),
        (("--ssl-keyfile", "k"), "--ssl-certfile"),
        (("--metrics-prefix", "a b"), "--metrics-prefix"),
        (("org/a", "--model", "org/b"), "org/a"),
    ],
)
def test_what_can_not_work_is_refused_in_one_line(arguments, found):
    assert found in refusal(*arguments)


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in refusal("--port", port)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("1k", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("0.5 gb", 1 << 29)],
)
def test_bytes_are_read_with_their_units(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "x", "-1", "1 parsec", "1e9"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ConfigError, match="no number of bytes"):
        parse_bytes(text)


def test_there_are_hardly_more_than_40_flags():
    assert len(ServeFlags.__dataclass_fields__) - 1 <= 42  # MODEL is no flag


def test_help_shows_flags_in_groups_with_defaults():
    text = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "140"}).output
    for found in ("Cache memory", "Scheduling", "--kv-cache-memory-bytes", "[default: 8000]"):
        assert found in text


def test_help_imports_neither_torch_nor_the_server():
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from nsa_serve.server import cli\n"
        "for arguments in (['--help'], ['serve', '--help'], ['chat', '--help']):\n"
        "    assert CliRunner().invoke(cli.app, arguments).exit_code == 0\n"
        "slow = {'torch', 'fastapi', 'uvicorn', 'nsa_serve.bench.cli'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_benchmarks_are_imported_when_they_are_run(monkeypatch):
    stand_in = types.ModuleType("nsa_serve.bench.cli")
    stand_in.app = typer.Typer()

    @stand_in.app.command()
    def latency(tokens: int):
        typer.echo(f"measured {tokens}")

    @stand_in.app.command()
    def throughput():
        raise AssertionError("not asked for")

    monkeypatch.setitem(sys.modules, "nsa_serve.bench.cli", stand_in)
    result = CliRunner().invoke(cli.app, ["bench", "latency", "7"])
    assert result.output == "measured 7\n"


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_only_loopback_addresses_keep_others_out(host, alone):
    assert is_loopback(host) is alone


def test_collect_env_prints_plain_text():
    result = CliRunner().invoke(cli.app, ["collect-env"])
    assert result.exit_code == 0
    rows = dict(line.split(":", 1) for line in result.output.splitlines())
    assert rows["torch"].strip()[0].isdigit()
    assert "threads" in rows["cpu"]
    assert rows["embedded model"].strip() == EMBEDDED_MODEL


def test_the_ready_line_has_what_a_person_wants_to_know():
    line = ready_line(description(), "http://127.0.0.1:8000/v1")
    assert line == (
        "Ready: http://127.0.0.1:8000/v1 · model m (bfloat16 on cpu) · attention nsa · "
        "context 8,192 tokens · cache 64,000 tokens"
    )
    assert "1024 tokens" in untrained_line(description())


def test_settings_take_limits_from_the_engine_and_defaults_from_its_checkpoint():
    flags = ServeFlags(
        served_model_name=["a", "b"], max_num_seqs=2, max_num_queued_reqs=3,
        tool_call_parser=ToolCallParser.HERMES, reasoning_parser=ReasoningParser.QWEN3,
    )  # fmt: skip
    engine = description(
        max_model_len=100_000,
        generation_config={"temperature": 0.6, "top_k": None, "do_sample": True},
    )
    settings = server_settings(flags, flags.engine_config(), engine)
    assert settings.model_names == ("a", "b")
    assert settings.max_model_len == engine.cache_tokens
    assert settings.max_open_requests == 5
    parsers = (settings.tool_call_parser, settings.reasoning_parser)
    assert parsers == (ToolCallParser.HERMES, ReasoningParser.QWEN3)
    assert (settings.defaults.temperature, settings.defaults.top_k) == (0.6, 0)


def test_a_generation_config_that_can_not_be_used_is_refused_by_its_key():
    flags = ServeFlags()
    engine = description(generation_config={"top_p": 3})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p"):
        server_settings(flags, flags.engine_config(), engine)


@pytest.mark.parametrize(
    ("given", "level"), [(None, logging.INFO), ("warning", logging.WARNING), ("Debug", 10)]
)
def test_the_environment_sets_the_level_of_the_log(monkeypatch, given, level):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    if given is None:
        monkeypatch.delenv("NSA_SERVE_LOG_LEVEL", raising=False)
    else:
        monkeypatch.setenv("NSA_SERVE_LOG_LEVEL", given)
    configure_logging(LogFormat.TEXT)
    assert logging.root.level == level


def test_a_level_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("NSA_SERVE_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="debug, info, warning, error, not 'loud'"):
        configure_logging(LogFormat.TEXT)


def test_the_bar_tells_of_bytes_once_there_are_some():
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with loading_bar(console) as bar:
        task = bar.add_task("m", total=None)

        def shown():
            with console.capture() as taken:
                console.print(bar.get_renderable())
            return taken.get()

        assert "Loading m" in shown()
        assert "/?" not in shown()
        bar.update(task, completed=1 << 20, total=4 << 20)
        assert "1.0/4.0 MiB" in shown()
