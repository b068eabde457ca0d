"""Server-sent events: what a streaming client receives, and a whole answer for all others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..request import RequestOutput, Usage
from .errors import error_body, error_response, log_failure, note_reason, reason_of
from .generation import ClientGone, Generation
from .http_protocol import BODY_WRITER, BodyWriter
from .replies import Chunk, Reply
from .request_log import CLIENT_LEFT

KEEP_ALIVE = ": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies such as nginx would hold back a stream otherwise.
    (b"x-accel-buffering", b"no"),
]


class Shape(Protocol):
    """How one kind of request words its answer."""

    def chunks(self, index: int, output: RequestOutput) -> Iterator[Chunk]:
        """The chunks that one output of a choice gives."""

    def events(self, index: int, output: RequestOutput) -> str:
        """These chunks as events."""
        return "".join(self.frame(chunk) for chunk in self.chunks(index, output))

    def usage_chunk(self, usages: Sequence[Usage]) -> Chunk | None:
        """The last chunk, with the usage of all choices, if it was asked for."""

    def whole(self, outputs: Sequence[RequestOutput]) -> Reply:
        """The answer in one piece, from one output of each choice."""

    def frame(self, chunk: Chunk) -> str:
        """A chunk as an event."""

    @property
    def end(self) -> str:
        """What a stream ends with."""

    def failure(self, error: Exception) -> str:
        """How a stream that has begun tells of an error."""


_MARK = "the text"
_encoder = msgspec.json.Encoder()


class TextEvent:
    """An event in which nothing but a text changes from one token to the next, worded once."""

    def __init__(self, frame: str) -> None:
        """``frame`` is the event with ``_MARK`` for its text, the last string of its kind."""
        self._before, _, self._after = frame.rpartition(f'"{_MARK}"')

    def of(self, text: str) -> str:
        return f"{self._before}{_encoder.encode(text).decode()}{self._after}"


class DataEvents(Shape):
    """Events without names, an error among them, and [DONE] after the last one."""

    end = "data: [DONE]\n\n"

    def __init__(self) -> None:
        self._text_events: dict[int, TextEvent] = {}  # by choice, once it has begun

    def text_chunk(self, index: int, text: str) -> Chunk | None:
        """A chunk of a text in the midst; None where its chunks carry more than that."""
        raise NotImplementedError

    def events(self, index: int, output: RequestOutput) -> str:
        known = self._text_events.get(index)
        if known is not None and output.text and output.finish_reason is None:
            return known.of(output.text)
        if known is None and (chunk := self.text_chunk(index, _MARK)) is not None:
            self._text_events[index] = TextEvent(self.frame(chunk))
        return super().events(index, output)

    def frame(self, chunk: Chunk) -> str:
        return f"data: {chunk.to_json()}\n\n"

    def failure(self, error: Exception) -> str:
        return f"data: {json.dumps(error_body(error), separators=(',', ':'))}\n\n{self.end}"


async def answer_whole(generation: Generation, shape: Shape) -> Response:
    """Wait for all choices, then answer in one piece. Raises what ended the generation."""
    outputs: dict[int, RequestOutput] = {}
    try:
        async with generation:
            while generation.num_unfinished:
                outputs.update(await generation.arrivals())
    except ClientGone:
        return Response(status_code=CLIENT_LEFT)  # it reaches only the log
    ordered = [outputs[index] for index in sorted(outputs)]
    return Response(shape.whole(ordered).to_json(), media_type="application/json")


class EventStream(Response):
    """Sends a generation as it comes.

    The headers wait for the first output (or the first silence), so that a request refused by
    the engine still gets its status. After that an error is an event.
    """

    def __init__(self, generation: Generation, shape: Shape, keep_alive: float) -> None:
        super().__init__()
        self._generation = generation
        self._shape = shape
        self._keep_alive = keep_alive
        self._usages: dict[int, Usage] = {}
        self._started = False
        self._writer: BodyWriter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._writer = scope.get("extensions", {}).get(BODY_WRITER)
        self._generation.write_through = self._write_through if self._writer else None
        try:
            async with self._generation:
                while self._generation.num_unfinished:
                    await self._write(send, await self._next_events())
            await self._write(send, self._closing())
        except ClientGone:
            return
        except Exception as error:
            log_failure(error, "a stream")
            if not self._started:
                await error_response(error)(scope, receive, send)
                return
            note_reason(scope, reason_of(error))
            await self._write(send, self._shape.failure(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_events(self) -> str:
        arrivals = await self._generation.arrivals(self._keep_alive)
        if not arrivals:
            return KEEP_ALIVE
        return "".join(self._events(index, output) for index, output in arrivals)

    def _events(self, index: int, output: RequestOutput) -> str:
        if output.usage is not None:
            self._usages[index] = output.usage
        return self._shape.events(index, output)

    def _write_through(self, index: int, output: RequestOutput) -> bool:
        """Write an output's events without waiting; false before the start and to a slow client."""
        if self._writer is None or not self._writer.ready:
            return False
        text = self._events(index, output)
        if text:
            self._writer.write(text.encode("utf-8", "replace"))
        return True

    def _closing(self) -> str:
        last = self._shape.usage_chunk([self._usages[index] for index in sorted(self._usages)])
        return (self._shape.frame(last) if last else "") + self._shape.end

    async def _write(self, send: Send, text: str) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if text:
            body = text.encode("utf-8", "replace")
            await send({"type": "http.response.body", "body": body, "more_body": True})
