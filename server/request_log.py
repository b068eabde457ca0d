"""An id for every request, echoed as ``x-request-id``; when it has ended, a line and its spans."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..request import RequestOutput

logger = logging.getLogger("nsa_serve.access")

HEADER = b"x-request-id"
_SOUND_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
CLIENT_LEFT = 499  # nginx's number, whatever status the answer had begun with
_PROBES = frozenset({"/health", "/ready", "/metrics"})
# Lines about refused requests, of each status, in so many seconds.
MAX_REFUSED = 20
REFUSED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What is told of a request when it has ended. Never its text, nor its answer's."""

    request_id: str
    method: str
    path: str
    status: int  # CLIENT_LEFT where nobody read the answer to its end; 0: none was sent
    start: float  # seconds on the monotonic clock
    end: float
    finals: Sequence[RequestOutput]  # of its choices, as far as they ended
    headers: Mapping[str, str]
    answer_id: str | None = None  # its body's ``id``; the choices' ids in the engine begin with it
    reason: str | None = None  # why it failed, as far as the log may tell

    @property
    def is_refused(self) -> bool:
        return 400 <= self.status < CLIENT_LEFT or self.status == HTTPStatus.SERVICE_UNAVAILABLE

    @property
    def num_prompt(self) -> int:
        return sum(final.usage.prompt_tokens for final in self.finals if final.usage)

    @property
    def num_generated(self) -> int:
        return sum(final.usage.completion_tokens for final in self.finals if final.usage)

    def fields(self) -> dict[str, Any]:
        """For a structured log."""
        known = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.end - self.start, 6),
        }
        noted = {"answer_id": self.answer_id, "reason": self.reason}
        known |= {name: value for name, value in noted.items() if value is not None}
        if not self.finals:
            return known
        reasons = [final.finish_reason for final in self.finals if final.finish_reason]
        return known | {
            "prompt_tokens": self.num_prompt,
            "generated_tokens": self.num_generated,
            "finish_reasons": [reason.value for reason in reasons],
        }


class Tracing(Protocol):
    """Where spans go."""

    def record(self, ended: EndedRequest) -> None: ...


class FloodGate:
    """Bounds the lines about refused requests, status by status, and counts those left out."""

    def __init__(self) -> None:
        self._since = 0.0
        self._counts: Counter[int] = Counter()

    def admits(self, status: int) -> bool:
        """Whether there may be one more line."""
        self._counts[status] += 1
        return self._counts[status] <= MAX_REFUSED

    def take_left_out(self, now: float) -> dict[int, int]:
        """Lines left out by status, once their time is over; and a new time begins."""
        if now < self._since + REFUSED_SECONDS:
            return {}
        counts, self._counts, self._since = self._counts, Counter(), now
        return {status: n - MAX_REFUSED for status, n in counts.items() if n > MAX_REFUSED}


class RequestLog:
    """ASGI middleware, outermost.

    Routes leave in a request's state its ``Generation`` and its answer's id, errors their reason.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self.app = app
        self._tracing = tracing
        self._flood = FloodGate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, start, status = _request_id(scope), time.monotonic(), 0
        # The server gives every request a copy of its own state.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self._tell(_ended(scope, status, start))

    def _tell(self, ended: EndedRequest) -> None:
        level = logging.DEBUG if ended.path in _PROBES else logging.INFO
        for status, count in self._flood.take_left_out(ended.end).items():
            logger.info("%d more requests were refused with %d", count, status)
        told = not ended.is_refused or self._flood.admits(ended.status)
        if told and logger.isEnabledFor(level):
            logger.log(level, _line(ended), extra={"fields": ended.fields()})
        if self._tracing is not None and ended.finals:
            self._tracing.record(ended)


def _ended(scope: Scope, status: int, start: float) -> EndedRequest:
    state = scope["state"]
    generation = state.get("generation")
    left = generation is not None and generation.client_left
    return EndedRequest(
        request_id=state["request_id"],
        method=scope["method"],
        path=scope["path"],
        status=CLIENT_LEFT if left else status,
        start=start,
        end=time.monotonic(),
        finals=generation.finals if generation is not None else (),
        headers={
            key.decode("latin-1"): value.decode("latin-1")
            for key, value in scope["headers"]
            if key in (b"traceparent", b"tracestate")
        },
        answer_id=state.get("answer_id"),
        reason=state.get("reason"),
    )


def _request_id(scope: Scope) -> str:
    """The client's own, if it is short and plain; else a new one."""
    for key, value in scope["headers"]:
        if key == HEADER and _SOUND_ID.fullmatch(value):
            return bytes(value).decode()
    return uuid.uuid4().hex


def _line(ended: EndedRequest) -> str:
    # The path is the client's: nothing that could begin a new line in the log.
    path = ended.path.encode("unicode_escape").decode()[:200]
    tokens = f", {ended.num_prompt} + {ended.num_generated} tokens" if ended.finals else ""
    reason = f", {ended.reason}" if ended.reason else ""
    timed = f"{ended.method} {path} {ended.status} in {ended.end - ended.start:.3f} s"
    ids = ", ".join(filter(None, (ended.request_id, ended.answer_id)))
    return f"{timed}{tokens}{reason}, {ids}"
