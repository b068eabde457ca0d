"""The flags of ``nsa-serve serve``, in vLLM's spelling: one table, its help, and what it means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import yaml

from ..config import (
    EMBEDDED_MODEL,
    NSA_MODEL,
    AttentionMode,
    DType,
    EngineConfig,
    Policy,
    default_model,
)
from ..errors import ConfigError
from .log_format import LogFormat
from .settings import ReasoningParser, ToolCallParser

T = TypeVar("T")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MODEL, _MEMORY, _SCHEDULE, _DEVICE, _SERVER, _BATCH = (
    "Model",
    "Cache memory",
    "Scheduling",
    "Device",
    "Server",
    "Batch",
)


# Flags whose names and values are the engine's own.
_PASSED_ON = (
    *("tokenizer", "revision", "dtype", "attention", "max_model_len", "chat_template", "seed"),
    *("gpu_memory_utilization", "scheduling_policy", "max_num_seqs", "max_num_batched_tokens"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "request_timeout", "device"),
    *("tensor_parallel_size", "enforce_eager", "deterministic", "kv_runners_up"),
)

_SIZES = ("kv_cache_memory_bytes", "kv_host_memory_bytes", "cpu_offload_bytes")


def refuse(message: object) -> typer.Exit:
    """Tell in one line why the command can't run; the exit to raise."""
    typer.echo(f"nsa-serve: {' '.join(str(message).split())}", err=True)
    return typer.Exit(2)


def parse_bytes(text: str) -> int:
    """A number of bytes: ``4096``, ``512M``, ``1.5GiB``; units are powers of 1024."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is no number of bytes, such as 512M or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_disk(text: str | None) -> dict[str, Any]:
    """The settings of ``DIR`` or ``DIR:SIZE``."""
    if text is None:
        return {}
    folder, colon, size = text.rpartition(":")
    if not colon:
        return {"kv_disk_dir": text}
    return {"kv_disk_dir": folder, "kv_disk_bytes": parse_bytes(size)}


def read_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take flags from a YAML file as defaults, so that the command line goes before them."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise refuse(f"--config {path} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise refuse(f"--config {path} must map flags to values")
    context.default_map = {**(context.default_map or {}), **_known_flags(context, path, values)}
    return path


def _known_flags(context: typer.Context, path: Path, values: dict[Any, Any]) -> dict[str, Any]:
    names = {
        option.lstrip("-"): parameter
        for parameter in context.command.params
        for option in parameter.opts
    }
    unknown = [str(key) for key in values if str(key).replace("_", "-") not in names]
    if unknown:
        raise refuse(f"--config {path} has flags nobody knows: {', '.join(unknown)}")
    found = {names[str(key).replace("_", "-")]: value for key, value in values.items()}
    return {str(flag.name): _as_given(flag.multiple, value) for flag, value in found.items()}


def _as_given(multiple: bool, value: Any) -> Any:
    """The value as the command line would give it: text, or for a repeated flag a list."""
    if isinstance(value, bool):
        return value
    if multiple:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    return str(value)


def _flag(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """What a command that runs a model can be told of it.

    Fields are flags, their defaults the flags' defaults.
    """

    positional: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help=f"A folder, a .gguf file, a Hub id, {EMBEDDED_MODEL} or {NSA_MODEL}.",
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.yaml",
            is_eager=True,
            callback=read_config_file,
            help="Flags as keys of a YAML file; the command line goes before it.",
        ),
    ] = None

    model: Annotated[str | None, _flag(_MODEL, "--model", help="The same as MODEL, by name.")] = (
        None
    )
    served_model_name: Annotated[
        list[str] | None,
        _flag(_MODEL, "--served-model-name", help="Name in the API; repeat for more names."),
    ] = None
    tokenizer: Annotated[
        str | None, _flag(_MODEL, "--tokenizer", help="Folder or Hub id of another tokenizer.")
    ] = None
    revision: Annotated[
        str | None, _flag(_MODEL, "--revision", help="Branch, tag or commit of a Hub id.")
    ] = None
    dtype: Annotated[DType, _flag(_MODEL, "--dtype", help="Type of weights and cache.")] = (
        DType.AUTO
    )
    attention: Annotated[
        AttentionMode,
        _flag(_MODEL, "--attention", help="auto: NSA where the checkpoint was trained with it."),
    ] = AttentionMode.AUTO
    max_model_len: Annotated[
        int | None,
        _flag(_MODEL, "--max-model-len", help="Context in tokens; default: the checkpoint's."),
    ] = None
    chat_template: Annotated[
        str | None, _flag(_MODEL, "--chat-template", help="A Jinja file in place of the model's.")
    ] = None
    tool_call_parser: Annotated[
        ToolCallParser,
        _flag(_MODEL, "--tool-call-parser", help="Form of its calls; auto: as its template says."),
    ] = ToolCallParser.AUTO
    reasoning_parser: Annotated[
        ReasoningParser | None,
        _flag(_MODEL, "--reasoning-parser", help="Give what it thinks apart from what it says."),
    ] = None
    load_format: Annotated[
        str,
        _flag(_MODEL, "--load-format", help="auto, or dummy for random weights (benchmarks)."),
    ] = "auto"
    mock_engine: Annotated[
        float | None,
        _flag(
            _MODEL,
            "--mock-engine",
            metavar="RATE",
            help="No model: a fixed text at RATE tokens/s for each request (front-end tests).",
        ),
    ] = None
    seed: Annotated[int, _flag(_MODEL, "--seed", help="Seed of the engine.")] = 0

    gpu_memory_utilization: Annotated[
        float,
        _flag(_MEMORY, "--gpu-memory-utilization", help="Share of a GPU's memory to use."),
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        str | None,
        _flag(_MEMORY, "--kv-cache-memory-bytes", help="Size of the cache, such as 2GiB."),
    ] = None
    kv_host_memory_bytes: Annotated[
        str,
        _flag(
            _MEMORY,
            "--kv-host-memory-bytes",
            help="Host memory for pages that the cache has no room for, such as 64GiB.",
        ),
    ] = "0"
    kv_runners_up: Annotated[
        int,
        _flag(
            _MEMORY,
            "--kv-runners-up",
            help="Host pages a decode step fetches ahead for each KV head; 0: none.",
        ),
    ] = 0
    kv_disk_dir: Annotated[
        str | None,
        _flag(
            _MEMORY,
            "--kv-disk-dir",
            metavar="DIR[:SIZE]",
            help="Keep prefixes that the cache gives up there, over restarts; 32GiB at most.",
        ),
    ] = None
    cpu_offload_bytes: Annotated[
        str,
        _flag(
            _MEMORY,
            "--cpu-offload-bytes",
            help="Weights that the GPU has no room for, copied from host memory every step.",
        ),
    ] = "0"
    kv_cache_dtype: Annotated[
        str, _flag(_MEMORY, "--kv-cache-dtype", help="auto: the model's type.")
    ] = "auto"
    prefix_caching: Annotated[
        bool,
        _flag(
            _MEMORY,
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep the cache of finished requests for prompts that begin alike.",
        ),
    ] = True

    scheduling_policy: Annotated[
        Policy, _flag(_SCHEDULE, "--scheduling-policy", help="Who goes first; nobody starves.")
    ] = Policy.FCFS
    max_num_seqs: Annotated[
        int, _flag(_SCHEDULE, "--max-num-seqs", help="Most requests in one step.")
    ] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        _flag(_SCHEDULE, "--max-num-batched-tokens", help="Most tokens in one step."),
    ] = None
    max_num_queued_reqs: Annotated[
        int, _flag(_SCHEDULE, "--max-num-queued-reqs", help="Waiting requests before a 503.")
    ] = 1024
    max_num_queued_tokens: Annotated[
        int,
        _flag(_SCHEDULE, "--max-num-queued-tokens", help="Their prompt tokens before a 503."),
    ] = 16 << 20
    request_timeout: Annotated[
        float | None,
        _flag(_SCHEDULE, "--request-timeout", help="Seconds a request may take; default: any."),
    ] = None

    device: Annotated[str, _flag(_DEVICE, "--device", help="auto, cpu or cuda.")] = "auto"
    tensor_parallel_size: Annotated[
        int, _flag(_DEVICE, "--tensor-parallel-size", "-tp", help="Number of GPUs.")
    ] = 1
    enforce_eager: Annotated[bool, _flag(_DEVICE, "--enforce-eager", help="No CUDA graphs.")] = (
        False
    )
    deterministic: Annotated[
        bool,
        _flag(_DEVICE, "--deterministic", help="The same text whatever else runs, bit by bit."),
    ] = False

    def engine_config(self) -> EngineConfig:
        """The engine's part. Raises ``ConfigError`` for what can't work or isn't built."""
        self._refuse()
        return EngineConfig.from_flags(
            **{name: getattr(self, name) for name in _PASSED_ON},
            model=self.positional or self.model or default_model(),
            served_model_name=self.served_model_name[0] if self.served_model_name else None,
            random_weights=self.load_format == "dummy",
            mock_token_rate=self.mock_engine,
            **{name: self._bytes(name) for name in _SIZES},
            **parse_disk(self.kv_disk_dir),
            enable_prefix_caching=self.prefix_caching,
        )

    def _bytes(self, name: str) -> int | None:
        text = getattr(self, name)
        try:
            return None if text is None else parse_bytes(text)
        except ConfigError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None

    def _refuse(self) -> None:
        if self.positional and self.model and self.positional != self.model:
            raise ConfigError(f"MODEL is {self.positional} and --model {self.model}; give one")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"--load-format is auto or dummy, not {self.load_format}")
        if self.kv_cache_dtype != "auto":
            raise ConfigError(f"--kv-cache-dtype {self.kv_cache_dtype} is not built yet; use auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags(EngineFlags):
    """Everything ``serve`` can be told."""

    host: Annotated[str, _flag(_SERVER, "--host", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _flag(_SERVER, "--port", min=0, max=65535, help="0: any free one.")] = 8000
    api_key: Annotated[
        list[str] | None,
        _flag(
            _SERVER,
            "--api-key",
            envvar="NSA_SERVE_API_KEY",
            show_default=False,
            help="Clients must send it; repeat for more keys.",
        ),
    ] = None
    allowed_origins: Annotated[
        list[str] | None,
        _flag(_SERVER, "--allowed-origins", help="Origin that browsers may call from; repeat."),
    ] = None
    ssl_keyfile: Annotated[
        Path | None, _flag(_SERVER, "--ssl-keyfile", help="Private key for TLS.")
    ] = None
    ssl_certfile: Annotated[
        Path | None, _flag(_SERVER, "--ssl-certfile", help="Certificate for TLS.")
    ] = None
    shutdown_timeout: Annotated[
        float,
        _flag(_SERVER, "--shutdown-timeout", min=0, help="Seconds to finish what runs at SIGTERM."),
    ] = 30.0
    metrics_prefix: Annotated[
        str, _flag(_SERVER, "--metrics-prefix", help="vllm: for dashboards made for vLLM.")
    ] = "nsa_serve"
    log_format: Annotated[
        LogFormat, _flag(_SERVER, "--log-format", help="json: an object a line, with request ids.")
    ] = LogFormat.TEXT
    otlp_traces_endpoint: Annotated[
        str | None,
        _flag(
            _SERVER,
            "--otlp-traces-endpoint",
            metavar="URL",
            help="Collector for spans of requests (OTLP over HTTP); needs nsa-serve[otel].",
        ),
    ] = None

    def _refuse(self) -> None:
        # super() without arguments does not know a class with slots.
        EngineFlags._refuse(self)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile need each other")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ConfigError(
                f"--metrics-prefix must be letters, digits and _, not {self.metrics_prefix!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFlags(EngineFlags):
    """Everything ``run-batch`` can be told."""

    input_file: Annotated[
        Path, _flag(_BATCH, "--input-file", "-i", help="Requests, a line of JSON each.")
    ]
    output_file: Annotated[
        Path, _flag(_BATCH, "--output-file", "-o", help="Answers; those it has are kept.")
    ]


def takes_flags(
    record: type[T], *, own_first: bool = False
) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a command of a function of one record, whose fields become the command's parameters.

    The help text has them in the record's order, or a derived record's own before those of its
    parents.
    """
    hints = get_type_hints(record, include_extras=True)
    columns = fields(record)  # type: ignore[arg-type]
    if own_first:
        owners = [own.__annotations__ for own in record.__mro__ if is_dataclass(own)]
        columns = tuple(
            sorted(columns, key=lambda f: next(i for i, own in enumerate(owners) if f.name in own))
        )
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in columns
    ]

    def decorate(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(record(**values))

        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
