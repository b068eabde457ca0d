"""uvicorn's HTTP protocol with the bounds it lacks: on size and time of a request's head."""

from __future__ import annotations

import asyncio
import weakref
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..errors import InvalidParameter
from .errors import error_response

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
HEAD_SECONDS = 30.0
BODY_WRITER = "nsa_serve.body_writer"  # its name among a scope's extensions


class BodyWriter:
    """Writes pieces of a streamed body that has begun, without the way through all layers.

    They let these pass anyway, and there is one for every token of every stream.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        # It lives as long as the request, and its scope holds this.
        self._cycle = weakref.proxy(cycle)

    @property
    def ready(self) -> bool:
        """Whether a piece can be written now: not before the head, nor to who reads too slowly."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding and cycle.response_started) and not (
            cycle.flow.write_paused or cycle.response_complete or cycle.disconnected
        )

    def write(self, piece: bytes) -> None:
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class BoundedHttp(HttpToolsProtocol):
    """Refuses heads of more than ``MAX_HEAD_BYTES`` or ``MAX_HEADERS``, and those that never end.

    What can't be read as HTTP is answered with our nested error, too.
    """

    _in_head = True
    _num_head_bytes = 0  # of URL and headers that are complete
    _num_unfinished = 0  # of pieces that brought nothing but a part of the head
    _too_large = False
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        began_before = self._in_head
        super().data_received(data)
        if began_before and self._in_head:
            self._num_unfinished += len(data)
            if self._num_unfinished > MAX_HEAD_BYTES:
                self._refuse_large()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._num_head_bytes = 0
        self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._num_unfinished = 0
        self._stop_waiting()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            extensions: dict[str, Any] = {BODY_WRITER: BodyWriter(self.cycle)}
            self.scope["extensions"] = extensions

    def send_400_response(self, msg: str) -> None:
        """Answer what can't be read and close; called for whatever a callback raised, too."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if self._too_large else None
            self.transport.write(_refusal(status or HTTPStatus.BAD_REQUEST))
        self.transport.close()

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._too_large = True
            # The parser stops, and its caller asks for an answer of 400.
            raise ValueError("the head is too large")

    def _refuse_large(self) -> None:
        self._too_large = True
        self.send_400_response("")

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "this is not valid HTTP",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"the head of the request has more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes"
    ),
}


def _refusal(status: HTTPStatus) -> bytes:
    body: Any = error_response(InvalidParameter(_MESSAGES[status])).body
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + bytes(body)
