"""The flags of ``nsa-serve eval``: where the model is, what it reads, where results go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import EMBEDDED_MODEL, AttentionMode, EngineConfig
from ..errors import ConfigError
from ..server.flags import EngineFlags
from ..train.held_out_prompts import HELD_OUT_PROMPTS
from .ablation import Ablation
from .chat import ChatSet, read_prompts
from .haystack import DEFAULT_TEXT
from .in_process import InProcess
from .over_http import OverHTTP, ServerAddress, open_client
from .subject import Subject
from .tasks import COUNTRY_FACTS, DEFAULT_KINDS

_SMALL_CACHE = "512MiB"
_SERVER, _WORK = "Server", "Evaluation"
_TASK_HELP = f"One kind; repeat. Default: {', '.join(DEFAULT_KINDS)} (not {COUNTRY_FACTS})."
# What an evaluation over HTTP reads of the engine's flags: MODEL is the name in the API there.
_SHARED = ("positional", "model", "config", "seed", "tokenizer")


def _flag(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


def parse_contexts(text: str) -> tuple[int, ...]:
    """Ascending lengths: ``1k,2k,64k`` or ``1000,2000``."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(k?)", part.strip().lower())
        if match is None or int(match[1]) == 0:
            raise ConfigError(f"--contexts {text!r} must be lengths, such as 1k,2k,4096")
        found.append(int(match[1]) << (10 if match[2] else 0))
    return tuple(sorted(set(found)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalFlags(EngineFlags):
    """Everything that all evaluations can be told."""

    url: Annotated[
        str | None,
        _flag(_SERVER, "--url", help="A running server's; without it MODEL runs in this process."),
    ] = None
    api_key: Annotated[
        str | None,
        _flag(
            _SERVER,
            "--api-key",
            envvar="NSA_SERVE_API_KEY",
            show_default=False,
            help="Key of the server.",
        ),
    ] = None
    concurrency: Annotated[
        int, _flag(_SERVER, "--concurrency", min=1, help="Requests to the server at a time.")
    ] = 4
    timeout: Annotated[
        float, _flag(_SERVER, "--timeout", min=0.001, help="Seconds for one answer of the server.")
    ] = 600.0
    text: Annotated[
        str, _flag(_WORK, "--text", help="late_speeches, emma, concise_commentary, or a file.")
    ] = DEFAULT_TEXT
    packages: Annotated[
        Path | None, _flag(_WORK, "--packages", help="Folder in which training unpacked packages.")
    ] = None
    output: Annotated[
        Path | None, _flag(_WORK, "--output", "-o", help="JSON of the results; it is gone on with.")
    ] = None
    ablate: Annotated[
        Ablation | None,
        _flag(_WORK, "--ablate", help="Take out a branch, or all blocks but the forced ones."),
    ] = None

    @contextmanager
    def subject(self) -> Iterator[Subject]:
        """The model to ask, loaded. Raises ``ConfigError`` or ``CheckpointError``."""
        if self.url is None:
            yield InProcess.load(self.engine_config(), self.ablate)
            return
        self._refuse_with_url()
        model = self.positional or self.model
        address = ServerAddress(
            self.url, model, self.api_key, self.concurrency, self.timeout, self.tokenizer
        )
        with open_client(address) as client:
            yield OverHTTP(address, client)

    def _refuse_with_url(self) -> None:
        given = [f for f in fields(EngineFlags) if f.name not in _SHARED]
        changed = [f.name for f in given if getattr(self, f.name) != f.default]
        changed += ["ablate"] if self.ablate is not None else []
        if changed:
            flag = f"--{changed[0].replace('_', '-')}"
            raise ConfigError(f"{flag} is for a model in this process; --url names a server")


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleFlags(EvalFlags):
    """Everything that ``eval needle`` can be told."""

    contexts: Annotated[
        str, _flag(_WORK, "--contexts", help="Tokens of prompt and answer together.")
    ] = "1k,2k,4k,8k,16k,32k,64k"
    depths: Annotated[
        int, _flag(_WORK, "--depths", min=1, help="Places of the needle, from 0 to 100 %.")
    ] = 11
    keys: Annotated[int, _flag(_WORK, "--keys", min=1, help="Different needles for each.")] = 5
    plot: Annotated[
        Path | None, _flag(_WORK, "--plot", help="PNG of the grid; default: beside the JSON.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityFlags(EvalFlags):
    """Everything that ``eval ppl`` can be told."""

    contexts: Annotated[str, _flag(_WORK, "--contexts", help="Tokens of a window.")] = (
        "2k,8k,32k,64k"
    )
    tokens: Annotated[
        int | None, _flag(_WORK, "--tokens", min=1, help="Of the text; default: all.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFlags(EvalFlags):
    """Everything that ``eval tasks`` can be told."""

    contexts: Annotated[
        str, _flag(_WORK, "--contexts", help="Tokens of prompt and answer together.")
    ] = "4k,8k,16k,32k,64k"
    task: Annotated[list[str] | None, _flag(_WORK, "--task", help=_TASK_HELP)] = None
    samples: Annotated[
        int, _flag(_WORK, "--samples", min=1, help="Of each kind at each context.")
    ] = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFlags(EvalFlags):
    """Everything that ``eval chat`` can be told."""

    base: Annotated[
        str, _flag(_WORK, "--base", help="The dense model beside it, run in this process.")
    ] = EMBEDDED_MODEL
    questions: Annotated[
        Path | None,
        _flag(_WORK, "--questions", help="Text, a prompt a line; default: the 50 held out."),
    ] = None
    prompts: Annotated[
        int | None, _flag(_WORK, "--prompts", min=1, help="The first so many; default: all.")
    ] = None
    max_tokens: Annotated[int, _flag(_WORK, "--max-tokens", min=1, help="Of an answer.")] = 200

    def chats(self) -> ChatSet:
        """What is asked. Raises ``ConfigError`` for a file that holds no prompts."""
        every = HELD_OUT_PROMPTS if self.questions is None else read_prompts(self.questions)
        return ChatSet(every[: self.prompts], self.max_tokens)

    def engine_config(self) -> EngineConfig:
        """As ever, but with a small cache: two models share the device."""
        if self.kv_cache_memory_bytes is not None:
            return EvalFlags.engine_config(self)
        return EvalFlags.engine_config(replace(self, kv_cache_memory_bytes=_SMALL_CACHE))

    def open_base(self) -> InProcess:
        """The base, loaded and dense. Raises ``ConfigError`` or ``CheckpointError``."""
        flags = ChatFlags(
            model=self.base,
            attention=AttentionMode.DENSE,
            device=self.device,
            dtype=self.dtype,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
        )
        return InProcess.load(flags.engine_config())
