"""``POST /v1/chat/completions``: from messages to an assistant's message, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from ..request import RequestOutput, Usage
from . import replies
from .answer.events import Answer, Event
from .assistant import delta_of, message_of
from .logprobs import chat_logprobs, prompt_logprobs
from .schemas import ChatCompletionRequest
from .services import Head, Prepared, Services, UsageOptions, by_prompt
from .stream import DataEvents
from .tools.use import tool_use
from .turn import PreparedTurn, Turn, finish_name, prepare_turn


def chat_router(services: Services) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=replies.ChatCompletion)
    async def chat_completions(request: Request) -> Response:
        """One answer to a conversation (or n of them)."""
        return await services.generate(
            request, ChatCompletionRequest, lambda chat: prepare_chat(services, chat)
        )

    return router


def prepare_chat(services: Services, chat: ChatCompletionRequest) -> Prepared:
    """Check, template and encode: everything before the engine. Runs on a worker thread."""
    services.prompts.check_model(chat.model)
    head = Head.new("chatcmpl", chat.model or services.settings.model_name)
    turn = Turn(
        messages=chat.messages,
        param="messages",
        tools=tool_use(
            chat.tools, chat.tool_choice, parallel=chat.parallel_tool_calls is not False
        ),
        max_tokens=chat.limit,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        add_generation_prompt=chat.add_generation_prompt is not False,
        template_arguments=chat.chat_template_kwargs,
    )
    prepared = prepare_turn(services, chat, turn, head)
    shape = ChatShape(services, chat, head, prepared)
    return Prepared(head.id, prepared.requests, shape, bool(chat.stream))


class ChatShape(DataEvents):
    """Words the outputs of one chat request: which choices have begun, and what each has used."""

    def __init__(
        self, services: Services, chat: ChatCompletionRequest, head: Head, prepared: PreparedTurn
    ) -> None:
        super().__init__()
        self._texts = services.texts
        self._num_top = chat.top_logprobs or 0
        self._wants_logprobs = bool(chat.logprobs)
        self._num_choices = chat.num_choices
        self._usage = UsageOptions.of(chat)
        self._head = head
        self._num_prompt = prepared.num_prompt
        self._parsers = prepared.parsers
        self._num_generated: dict[int, int] = {}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[replies.Chunk]:
        """The role before a choice's first output, then what it says as far as that is known."""
        if index not in self._num_generated:
            self._num_generated[index] = 0
            yield self._chunk(index, replies.Delta(role="assistant", content=""))
        self._num_generated[index] += len(output.token_ids)
        events = self._events(index, output)
        if events or output.logprobs or output.finish_reason:
            yield self._chunk(index, delta_of(events), output)

    def text_chunk(self, index: int, text: str) -> replies.Chunk | None:
        if self._wants_logprobs or self._usage.in_each or not self._parsers[index].is_plain:
            return None
        return self._chunk(index, replies.Delta(content=text))

    def _events(self, index: int, output: RequestOutput) -> list[Event]:
        parser = self._parsers[index]
        events = parser.feed(output.text)
        return events + parser.finish() if output.finish_reason else events

    def usage_chunk(self, usages: Sequence[Usage]) -> replies.Chunk | None:
        if not self._usage.at_end:
            return None
        total = replies.Usage.total(by_prompt(usages, self._num_choices))
        return self._with_choices([], total)

    def whole(self, outputs: Sequence[RequestOutput]) -> replies.Reply:
        usages = [output.usage for output in outputs if output.usage is not None]
        first = outputs[0].prompt_logprobs
        extra: dict[str, Any] = (
            {} if first is None else {"prompt_logprobs": prompt_logprobs(first, self._texts)}
        )
        return replies.ChatCompletion(
            id=self._head.id,
            object="chat.completion",
            created=self._head.created,
            model=self._head.model,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=replies.Usage.total(by_prompt(usages, self._num_choices)),
            **extra,
        )

    def _choice(self, index: int, output: RequestOutput) -> replies.ChatChoice:
        assert output.finish_reason is not None
        return replies.ChatChoice(
            index=index,
            message=message_of(Answer.of(self._events(index, output))),
            logprobs=self._logprobs(output),
            finish_reason=finish_name(output.finish_reason, self._parsers[index]),
            stop_reason=output.stop_reason,
        )

    def _logprobs(self, output: RequestOutput | None) -> replies.ChatLogprobs | None:
        if output is None or output.logprobs is None:
            return None
        return chat_logprobs(output.logprobs, self._texts, self._num_top)

    def _chunk(
        self, index: int, delta: replies.Delta, output: RequestOutput | None = None
    ) -> replies.ChatChunk:
        finish = output.finish_reason if output else None
        choice = replies.ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(output),
            finish_reason=finish_name(finish, self._parsers[index]) if finish else None,
            stop_reason=output.stop_reason if output and finish else UNSET,
        )
        return self._with_choices([choice], self._usage_so_far(index))

    def _usage_so_far(self, index: int) -> replies.Usage | None:
        if not self._usage.in_each:
            return None
        return replies.Usage.so_far(self._num_prompt, self._num_generated[index])

    def _with_choices(
        self, choices: list[replies.ChatChunkChoice], usage: replies.Usage | None
    ) -> replies.ChatChunk:
        return replies.ChatChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            # A stream that was asked for usage has the key in every chunk.
            usage=usage if self._usage.at_end else UNSET,
        )
