"""``POST /v1/responses``: from items to output items, whole or in typed events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from ...request import FinishReason, RequestOutput, Usage
from .. import replies
from ..answer.events import Event, Reasoning
from ..errors import error_body
from ..services import Head, Prepared, Services
from ..stream import Shape
from ..tools.use import tool_use
from ..turn import PreparedTurn, Turn, prepare_turn
from .items import messages_of
from .schemas import ResponsesRequest
from .writer import Fields, ItemWriter


def responses_router(services: Services) -> APIRouter:
    """The route of responses."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=replies.ResponseObject)
    async def responses(request: Request) -> Response:
        """The next response in a conversation that the request brings whole."""
        return await services.generate(
            request, ResponsesRequest, lambda asked: prepare_response(services, asked)
        )

    return router


def prepare_response(services: Services, asked: ResponsesRequest) -> Prepared:
    """Check, template and encode: everything before the engine. Runs on a worker thread."""
    services.prompts.check_model(asked.model)
    head = Head.new("resp", asked.model or services.settings.model_name, "_")
    parallel = asked.parallel_tool_calls is not False
    turn = Turn(
        messages=messages_of(asked.input, asked.instructions),
        param="input",
        tools=tool_use(asked.chat_tools, asked.chat_choice, parallel=parallel),
        max_tokens=asked.limit,
        logprobs=None,
        template_arguments=asked.chat_template_kwargs,
    )
    prepared = prepare_turn(services, asked, turn, head)
    shape = ResponseShape(services, asked, head, prepared)
    return Prepared(head.id, prepared.requests, shape, bool(asked.stream))


class ResponseShape(Shape):
    """Words the outputs of one response: its items as they grow, and how many events were sent."""

    def __init__(
        self, services: Services, asked: ResponsesRequest, head: Head, prepared: PreparedTurn
    ) -> None:
        self._tokenizer = services.tokenizer
        self._asked = asked
        self._head = head
        (self._parser,) = prepared.parsers
        self._sampling = prepared.requests[0].sampling
        self._writer = ItemWriter()
        self._reasoning: list[str] = []
        self._num_events = 0

    # How its events are framed: by name, and without [DONE] at the end.

    end = ""

    def frame(self, chunk: replies.Chunk) -> str:
        assert isinstance(chunk, replies.ResponseEvent)
        return f"event: {chunk.type}\ndata: {chunk.to_json()}\n\n"

    def failure(self, error: Exception) -> str:
        """An error after the beginning: its own event, then the failed response."""
        told = error_body(error)["error"]
        public = {"code": "server_error", "message": told["message"]}
        failed = self._response("failed", error=public)
        fields = {"type": "error", **{key: told[key] for key in ("code", "message", "param")}}
        events = (fields, {"type": "response.failed", "response": failed})
        return "".join(self.frame(self._numbered(event)) for event in events)

    def chunks(self, index: int, output: RequestOutput) -> Iterator[replies.Chunk]:
        """The events that one output gives, those of the beginning before the first."""
        for fields in self._fields(output):
            yield self._numbered(fields)

    def usage_chunk(self, usages: Sequence[Usage]) -> replies.Chunk | None:
        """Nothing: the last event has had the usage."""
        return None

    def whole(self, outputs: Sequence[RequestOutput]) -> replies.Reply:
        *_, last = self._fields(outputs[0])
        response: replies.ResponseObject = last["response"]
        return response

    def _numbered(self, fields: Fields) -> replies.ResponseEvent:
        self._num_events += 1
        return replies.ResponseEvent(fields["type"], self._num_events - 1, fields)

    def _fields(self, output: RequestOutput) -> Iterator[Fields]:
        if not self._num_events:
            for kind in ("response.created", "response.in_progress"):
                yield {"type": kind, "response": self._response("in_progress")}
        for event in self._events(output):
            if isinstance(event, Reasoning):
                self._reasoning.append(event.text)
            yield from self._writer.write(event)
        if output.finish_reason is not None:
            yield from self._ending(output)

    def _events(self, output: RequestOutput) -> list[Event]:
        events = self._parser.feed(output.text)
        return events + self._parser.finish() if output.finish_reason else events

    def _ending(self, output: RequestOutput) -> Iterator[Fields]:
        assert output.usage is not None
        cut = output.finish_reason is FinishReason.LENGTH
        status = "incomplete" if cut else "completed"
        yield from self._writer.finish(status)
        reason = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
        response = self._response(status, usage=self._usage(output.usage), **reason)
        yield {"type": f"response.{status}", "response": response}

    def _usage(self, usage: Usage) -> replies.ResponseUsage:
        # The engine counts tokens, not what they are of, so the reasoning is counted anew.
        reasoning = self._tokenizer.encode("".join(self._reasoning), add_special=False)
        return replies.ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            output_tokens=usage.completion_tokens,
            output_tokens_details={"reasoning_tokens": len(reasoning)},
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )

    def _response(self, status: str, **fields: Any) -> replies.ResponseObject:
        asked = self._asked
        echoed = asked.model_dump(
            mode="json", include={"instructions", "metadata"}, exclude_none=True
        )
        return replies.ResponseObject(
            id=self._head.id,
            object="response",
            created_at=self._head.created,
            model=self._head.model,
            status=status,
            output=[item for item in self._writer.items if item["status"] != "in_progress"],
            instructions=echoed.get("instructions"),
            metadata=echoed.get("metadata", {}),
            tools=[tool.model_dump(mode="json") for tool in asked.tools or ()],
            tool_choice=_choice(asked),
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_output_tokens=asked.limit,
            **fields,
        )


def _choice(asked: ResponsesRequest) -> Any:
    choice = asked.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or ("auto" if asked.tools else "none")
    return json.loads(choice.model_dump_json())
