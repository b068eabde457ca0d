"""``POST /v1/completions``: prompts as text or token ids, each continued n times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from ..request import EngineRequest, RequestOutput, TokenLogprob, Usage
from . import replies
from .logprobs import CompletionLogprobsWriter, joined, prompt_logprobs
from .schemas import CompletionRequest, TokenIds
from .services import FINISH_NAMES, Head, Prepared, Services, UsageOptions, by_prompt
from .stream import DataEvents

DEFAULT_MAX_TOKENS = 16


def completions_router(services: Services) -> APIRouter:
    """The route of text completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=replies.Completion)
    async def completions(request: Request) -> Response:
        """A continuation of each prompt (or n of each)."""
        return await services.generate(
            request, CompletionRequest, lambda asked: prepare_completion(services, asked)
        )

    return router


def prepare_completion(services: Services, asked: CompletionRequest) -> Prepared:
    """Check and encode: everything before the engine. Runs on a worker thread."""
    services.prompts.check_model(asked.model)
    add_special = asked.add_special_tokens is not False
    encoded = [services.prompts.completion(p, add_special=add_special) for p in asked.prompts]
    services.prompts.check_queue([len(ids) for ids in encoded], asked.num_choices)
    head = Head.new("cmpl", asked.model or services.settings.model_name)
    requests = [
        _engine_request(services, asked, head, token_ids, prompt * asked.num_choices, choice)
        for prompt, token_ids in enumerate(encoded)
        for choice in range(asked.num_choices)
    ]
    shape = CompletionShape(services, asked, head, encoded)
    return Prepared(head.id, requests, shape, bool(asked.stream))


def _engine_request(
    services: Services,
    asked: CompletionRequest,
    head: Head,
    token_ids: TokenIds,
    first_index: int,
    choice: int,
) -> EngineRequest:
    max_tokens = services.prompts.fit(
        len(token_ids), asked.max_tokens or DEFAULT_MAX_TOKENS, "prompt"
    )
    return EngineRequest(
        request_id=f"{head.id}-{first_index + choice}",
        prompt_token_ids=token_ids,
        sampling=services.prompts.sampling(
            asked,
            max_tokens=max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=_wanted_prompt_logprobs(asked),
            choice=choice,
        ),
        priority=asked.priority or 0,
        deadline=asked.deadline,
        timeout=asked.timeout,
        cache_salt=asked.cache_salt or "",
        stream=bool(asked.stream),
    )


def _wanted_prompt_logprobs(asked: CompletionRequest) -> int | None:
    """An echo with logprobs shows those of the prompt too."""
    echoed = asked.logprobs if asked.echo else None
    wanted = [count for count in (asked.prompt_logprobs, echoed) if count is not None]
    return max(wanted, default=None)


class CompletionShape(DataEvents):
    """Words the outputs of one completion request; knows what each choice has been sent."""

    def __init__(
        self,
        services: Services,
        asked: CompletionRequest,
        head: Head,
        encoded: Sequence[TokenIds],
    ) -> None:
        super().__init__()
        self._services = services
        self._asked = asked
        self._head = head
        self._encoded = encoded
        self._usage = UsageOptions.of(asked)
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._num_generated: dict[int, int] = {}
        self._echoed: set[int] = set()

    def chunks(self, index: int, output: RequestOutput) -> Iterator[replies.Chunk]:
        """A choice's text as far as there is any, the echoed prompt before the first."""
        self._num_generated[index] = self._num_generated.get(index, 0) + len(output.token_ids)
        text, logprobs = self._text(index, output), self._logprobs(index, output)
        if not (text or logprobs or output.finish_reason):
            return
        finish = output.finish_reason
        choice = replies.CompletionChunkChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=FINISH_NAMES[finish] if finish else None,
            stop_reason=output.stop_reason if finish else UNSET,
        )
        yield self._with_choices([choice], self._usage_so_far(index))

    def text_chunk(self, index: int, text: str) -> replies.Chunk | None:
        if self._asked.logprobs is not None or self._usage.in_each:
            return None
        choice = replies.CompletionChunkChoice(
            index=index, text=text, logprobs=None, finish_reason=None
        )
        return self._with_choices([choice], None)

    def usage_chunk(self, usages: Sequence[Usage]) -> replies.Chunk | None:
        if not self._usage.at_end:
            return None
        return self._with_choices([], self._total(usages))

    def whole(self, outputs: Sequence[RequestOutput]) -> replies.Reply:
        usages = [output.usage for output in outputs if output.usage is not None]
        return replies.Completion(
            id=self._head.id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=self._total(usages),
        )

    def _choice(self, index: int, output: RequestOutput) -> replies.CompletionChoice:
        assert output.finish_reason is not None
        extra: dict[str, Any] = {}
        if self._asked.prompt_logprobs is not None and output.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._services.texts)
        return replies.CompletionChoice(
            index=index,
            text=self._text(index, output),
            logprobs=self._logprobs(index, output),
            finish_reason=FINISH_NAMES[output.finish_reason],
            stop_reason=output.stop_reason,
            **extra,
        )

    def _text(self, index: int, output: RequestOutput) -> str:
        """The output's text, after the prompt where that is echoed and wasn't yet."""
        if not self._asked.echo or index in self._echoed:
            return output.text
        self._echoed.add(index)
        return self._prompt_text(index) + output.text

    def _prompt_text(self, index: int) -> str:
        prompt = self._asked.prompts[index // self._asked.num_choices]
        if isinstance(prompt, str):
            return prompt
        return self._services.tokenizer.decode(prompt, skip_special=False)

    def _logprobs(self, index: int, output: RequestOutput) -> replies.CompletionLogprobs | None:
        wanted = self._asked.logprobs
        if wanted is None:
            return None
        writer = self._writers.get(index)
        if writer is None:
            writer = CompletionLogprobsWriter(self._services.texts, wanted)
            self._writers[index] = writer
        entries: Sequence[TokenLogprob] = output.logprobs or []
        if not self._asked.echo or output.prompt_logprobs is None:
            return writer.write(entries) if entries else None
        token_ids = self._encoded[index // self._asked.num_choices]
        echoed = writer.write_prompt(token_ids, output.prompt_logprobs)
        return joined(echoed, writer.write(entries))

    def _total(self, usages: Sequence[Usage]) -> replies.Usage:
        return replies.Usage.total(by_prompt(usages, self._asked.num_choices))

    def _usage_so_far(self, index: int) -> replies.Usage | None:
        if not self._usage.in_each:
            return None
        num_prompt = len(self._encoded[index // self._asked.num_choices])
        return replies.Usage.so_far(num_prompt, self._num_generated[index])

    def _with_choices(
        self, choices: list[replies.CompletionChunkChoice], usage: replies.Usage | None
    ) -> replies.CompletionChunk:
        return replies.CompletionChunk(
            id=self._head.id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage if self._usage.at_end else UNSET,
        )
