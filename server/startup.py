"""From flags to an engine that runs and the settings of what stands before it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from ..config import EngineConfig
from ..engine.messages import EngineDescription
from ..errors import CheckpointError, ConfigError
from ..tokenizer import Tokenizer
from .client import EngineClient
from .errors import invalid_fields
from .flags import EngineFlags
from .schemas import CompletionRequest
from .settings import SamplingDefaults, ServerSettings

console = Console(stderr=True, highlight=False)


class _BytesRead(DownloadColumn):
    """Bytes read of all; nothing before there are any, while the engine's modules are imported."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def loading_bar(console: Console) -> Progress:
    """A bar for weights that load, where there is a person to see it."""
    return Progress(
        TextColumn("Loading {task.description}"),
        BarColumn(),
        _BytesRead(binary_units=True),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


async def start_engine(config: EngineConfig) -> EngineClient:
    """The engine, with a bar while its weights load. Ctrl-C and SIGTERM end the start."""
    with loading_bar(console) as progress:
        task = progress.add_task(config.source.model, total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return await EngineClient.start(config, on_progress)


def tokenizer_of(description: EngineDescription) -> Tokenizer:
    """The model's tokenizer. Raises ``ConfigError`` where it has none."""
    if description.tokenizer is None:
        raise ConfigError(f"{description.model_name} has no tokenizer; give one with --tokenizer")
    return Tokenizer(description.tokenizer)


def server_settings(
    flags: EngineFlags, config: EngineConfig, description: EngineDescription
) -> ServerSettings:
    """The server's settings: limits from the engine's cache, defaults from its checkpoint."""
    schedule = config.schedule
    return ServerSettings(
        model_names=tuple(flags.served_model_name or [config.source.public_name]),
        # A request longer than the cache could never run, whatever the context.
        max_model_len=min(description.max_model_len, description.cache_tokens),
        vocab_size=description.vocab_size,
        engine=description,
        defaults=_sampling_defaults(description.generation_config),
        tool_call_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
        max_queued_requests=schedule.max_num_queued_reqs,
        max_queued_tokens=schedule.max_num_queued_tokens,
        max_open_requests=schedule.max_num_seqs + schedule.max_num_queued_reqs,
        max_open_tokens=schedule.max_num_queued_tokens + description.cache_tokens,
    )


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """What generation_config.json says of sampling; a greedy checkpoint has do_sample false."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        # The checkpoint may say no more than a request may.
        CompletionRequest.model_validate({"prompt": "", **given})
    except ValidationError as error:
        raise CheckpointError(f"generation_config.json: {invalid_fields(error)}") from None
    return SamplingDefaults(**given)
