"""What the server asks of the engine and of the tokenizer, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from ..request import EngineRequest, RequestOutput
from ..stats import CacheMap, StatsSnapshot
from .output_stream import Sink


class Engine(Protocol):
    """The engine as the server sees it."""

    def submit(
        self, request: EngineRequest, sink: Sink | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until the final one. Closing the iterator early aborts the request.

        Those that a ``sink`` takes come to it and not here; it must not raise.
        """

    async def ping(self, timeout: float) -> None:
        """Return once the engine loop has answered; else ``TimeoutError`` or ``EngineDead``."""

    def cpu_seconds(self) -> float | None:
        """Processor time that it has taken; None where that says nothing about its steps."""

    def dump_stacks(self) -> None:
        """Have the engine write the stacks of all its threads to the log, if it still can."""

    async def stats(self) -> StatsSnapshot:
        """A snapshot of the engine's counters."""

    async def cache_map(self, patience: float) -> CacheMap | None:
        """A map of the cache; after ``patience`` seconds the last one, if there was any."""


class Tokenizer(Protocol):
    """Text to token ids and back. Called on threads, several at once."""

    @property
    def tool_template(self) -> str | None:
        """The text of the chat template that shows tools, if there is one."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str: ...
