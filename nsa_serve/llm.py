"""Offline use: the engine in this process, prompts in, finished results out."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .config import EMBEDDED_MODEL, EngineConfig
from .engine.engine import Engine
from .engine.messages import EngineDescription
from .errors import InvalidParameter, Overloaded
from .request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What became of one prompt. With ``FinishReason.ERROR``, ``error`` says why."""

    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    error: str | None


class LLM:
    """A model in this process. Not for several threads at once.

    Flags are those of the server, with underscores: ``LLM(model, attention="nsa")``.
    Nobody waits for single tokens here, so that steps are filled (``interactive=False``).
    Raises ``ConfigError`` or ``CheckpointError`` where the model can't be loaded.
    """

    def __init__(self, model: str = EMBEDDED_MODEL, **flags: Any) -> None:
        config = EngineConfig.from_flags(**{"model": model, "interactive": False, **flags})
        self._begin(config, Engine.from_config(config))

    @classmethod
    def over(cls, engine: Engine, config: EngineConfig) -> Self:
        """The same over an engine that ``config`` has built already."""
        llm = cls.__new__(cls)
        llm._begin(config, engine)
        return llm

    def _begin(self, config: EngineConfig, engine: Engine) -> None:
        self.config = config
        self._engine = engine
        self._numbers = itertools.count()

    @property
    def description(self) -> EngineDescription:
        """What runs: the model's name, its attention, type, device and limits."""
        assert self._engine.description is not None
        return self._engine.description

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ``InvalidParameter`` for a model that has none (random weights)."""
        if self._engine.tokenizer is None:
            raise InvalidParameter("this model has no tokenizer; give token ids")
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestResult]:
        """Complete every prompt (text or token ids); results in the order of the prompts.

        ``sampling`` is for all, or one for each. ``progress`` shows a bar on the terminal.
        Raises ``RequestError`` for what can't be run; then nothing is left running.
        """
        texts = _listed(prompts)
        settings = _spread(sampling, len(texts))
        requests = [
            EngineRequest(
                request_id=f"llm-{next(self._numbers)}",
                prompt_token_ids=self._encode(prompt),
                sampling=params,
                stream=False,
            )
            for prompt, params in zip(texts, settings, strict=True)
        ]
        finals = self._run(requests, progress)
        return [
            _result(prompt, request, finals[request.request_id])
            for prompt, request in zip(texts, requests, strict=True)
        ]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **template_options: Any,
    ) -> list[RequestResult]:
        """Answer one conversation, or each of several, by the model's chat template."""
        talks: Sequence[Any] = [messages] if _is_conversation(messages) else messages
        prompts = [self.tokenizer.encode_chat(talk, **template_options) for talk in talks]
        return self.generate(prompts, sampling, progress=progress)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, requests: Sequence[EngineRequest], progress: bool) -> dict[str, RequestOutput]:
        """The final output of each request, by id."""
        finals: dict[str, RequestOutput] = {}
        waiting = deque(requests)
        with _bar(len(requests), progress) as bar:
            try:
                while len(finals) < len(requests):
                    self._admit(waiting)
                    for output in self._engine.step(time.monotonic()):
                        finals[output.request_id] = output
                    bar.update(bar.task_ids[0], completed=len(finals))
            finally:
                self._abandon(request.request_id for request in requests)
        return finals

    def _admit(self, waiting: deque[EngineRequest]) -> None:
        """Queue as many as the engine takes; the rest waits here."""
        while waiting:
            try:
                self._engine.add(waiting[0], time.monotonic())
            except Overloaded:
                return
            waiting.popleft()

    def _abandon(self, request_ids: Iterable[str]) -> None:
        """After a failure or Ctrl-C: leave nothing running. Those that have ended stay so."""
        for request_id in request_ids:
            self._engine.abort(request_id, time.monotonic())
        while self._engine.has_work:
            self._engine.step(time.monotonic())


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, of text or of ids, as a list of one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _is_conversation(messages: Conversation | Sequence[Conversation]) -> bool:
    return len(messages) > 0 and isinstance(messages[0], Mapping)


def _spread(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if sampling is None:
        return [SamplingParams()] * count
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise InvalidParameter(f"{len(sampling)} sampling settings for {count} prompts")
    return list(sampling)


def _result(prompt: Prompt, request: EngineRequest, final: RequestOutput) -> RequestResult:
    assert final.finish_reason is not None
    assert final.usage is not None
    return RequestResult(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=request.prompt_token_ids,
        text=final.text,
        token_ids=final.token_ids,
        finish_reason=final.finish_reason,
        stop_reason=final.stop_reason,
        usage=final.usage,
        logprobs=final.logprobs,
        prompt_logprobs=final.prompt_logprobs,
        error=final.error,
    )


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Progress]:
    """A bar that counts finished prompts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not shown) as progress:
        progress.add_task("prompts", total=total)
        yield progress
