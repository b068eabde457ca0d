"""What every route needs, put together once; and the one way from a parsed request to an answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ..request import EngineRequest, Usage
from . import replies
from .admission import Admission
from .body import T, UnknownNames, parse, read_json_bytes
from .generation import Generation
from .logprobs import TokenTexts
from .ports import Engine, Tokenizer
from .prometheus import Metrics
from .prompts import PromptEncoder, Workers
from .recent import Recent
from .schemas import GenerationRequest
from .settings import ServerSettings
from .stream import EventStream, Shape, answer_whole
from .watchdog import Watchdog

R = TypeVar("R")

FINISH_NAMES: dict[str, replies.FinishName] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of one answer share."""

    id: str
    created: int  # Unix seconds
    model: str

    @classmethod
    def new(cls, prefix: str, model: str, joint: str = "-") -> Head:
        return cls(f"{prefix}{joint}{uuid.uuid4().hex}", int(time.time()), model)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for the engine, and how its answer is worded."""

    answer_id: str
    requests: Sequence[EngineRequest]
    shape: Shape
    stream: bool


@dataclass(frozen=True, slots=True)
class UsageOptions:
    """Which usage a stream carries."""

    at_end: bool
    in_each: bool

    @classmethod
    def of(cls, request: GenerationRequest) -> UsageOptions:
        options = request.stream_options
        at_end = bool(options and options.include_usage)
        return cls(at_end, at_end and bool(options and options.continuous_usage_stats))


def by_prompt(usages: Sequence[Usage], num_choices: int) -> list[list[Usage]]:
    """Usages of all choices, in groups of the ``num_choices`` that share a prompt."""
    starts = range(0, len(usages), num_choices)
    return [list(usages[start : start + num_choices]) for start in starts]


@dataclass(frozen=True, slots=True)
class Services:
    """The server's parts, shared by all routes."""

    engine: Engine
    watchdog: Watchdog
    tokenizer: Tokenizer
    settings: ServerSettings
    admission: Admission
    metrics: Metrics
    recent: Recent
    workers: Workers
    prompts: PromptEncoder
    texts: TokenTexts
    unknown_names: UnknownNames

    @classmethod
    def build(cls, engine: Engine, tokenizer: Tokenizer, settings: ServerSettings) -> Services:
        return cls(
            engine=engine,
            watchdog=Watchdog(engine, settings.health_timeout),
            tokenizer=tokenizer,
            settings=settings,
            admission=Admission(
                max_requests=settings.max_open_requests, max_tokens=settings.max_open_tokens
            ),
            metrics=Metrics(settings.metrics_prefix, settings.model_name),
            recent=Recent(),
            workers=Workers(settings.tokenizer_threads, settings.max_open_requests),
            prompts=PromptEncoder(tokenizer, settings),
            texts=TokenTexts(tokenizer),
            unknown_names=UnknownNames(),
        )

    async def read(self, request: Request, model: type[T], then: Callable[[T], R]) -> R:
        """Parse the body and do ``then`` with it, both on a worker thread."""
        body = await read_json_bytes(request)
        return await self.workers.run(lambda: then(self._parse(model, body)))

    def _parse(self, model: type[T], body: bytes) -> T:
        asked = parse(model, body)
        self.unknown_names.tell(asked.unknown_names)
        return asked

    async def generate(
        self, request: Request, model: type[T], prepare: Callable[[T], Prepared]
    ) -> Response:
        """Answer one completion request, streaming or in one piece. Raises errors of errors.py."""
        self.admission.check()
        prepared = await self.read(request, model, prepare)
        generation = Generation(
            self.engine,
            prepared.requests,
            admission=self.admission,
            metrics=self.metrics,
            recent=self.recent,
            receive=request.receive,
        )
        request.state.generation = generation
        request.state.answer_id = prepared.answer_id
        if prepared.stream:
            return EventStream(generation, prepared.shape, self.settings.keep_alive)
        return await answer_whole(generation, prepared.shape)
