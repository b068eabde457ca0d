"""HTTP/1.1 for load tests: C parsing, connections kept alive, each piece stamped as it arrives.

General clients spend more on an event than a fast server does. With 256 streams on an Intel Xeon,
httpx 0.28 took 45 to 64 µs of CPU an event and aiohttp 3.14 11 to 13, for reading and parsing
alone; this takes 7 with all that a load test keeps of it. uvloop was below each.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

Clock = Callable[[], float]
OnPiece = Callable[[bytes, float], None]  # (body bytes, when they arrived)
Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[None]]

# What of an error's body is kept for the report.
_ERROR_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; ``body`` is empty where its pieces were handed on."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body's value. Raises ``ValueError`` where it is no JSON."""
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """One connection: one exchange at a time, its pieces stamped when the socket gives them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._on_piece: OnPiece | None = None
        self._done: asyncio.Future[Reply] | None = None
        self._kept: list[bytes] = []
        self._now = 0.0
        self._ends_with_connection = False
        self.reusable = False
        self.heard = False  # any byte of the current answer

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, on_piece: OnPiece | None) -> Reply:
        """Send a request and wait for its whole answer.

        The body of a 200 goes to ``on_piece``, if there is one. Raises ``ConnectionError`` where
        the answer does not end.
        """
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_piece, self._kept = on_piece, []
        self._ends_with_connection, self.heard, self.reusable = True, False, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is no HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if exc is None and self.heard and self._ends_with_connection and self._has_head():
            self._succeed()
        self._fail(ConnectionError(f"the connection closed before the answer ended: {exc or ''}"))

    def _has_head(self) -> bool:
        return bool(self._parser.get_http_version() and self._parser.get_status_code())

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_body(self, body: bytes) -> None:
        if self._on_piece is not None and self._parser.get_status_code() == 200:
            self._on_piece(body, self._now)
        else:
            self._kept.append(body)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self._succeed()

    def _succeed(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(Reply(self._parser.get_status_code(), b"".join(self._kept)))

    def _fail(self, error: ConnectionError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class HTTPClient:
    """Exchanges with one server, over as many connections as are in use at a time.

    ``connect`` replaces the way to the server; ``clock`` stamps pieces, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        clock: Clock,
        connect: Connect | None = None,
        verify: bool = True,
    ) -> None:
        parts = urlsplit(base_url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no http:// or https:// address")
        self.base_url = parts.geturl()
        self.clock = clock
        self._path = parts.path
        self._connect = connect or _connector(parts.hostname, parts.port, parts.scheme, verify)
        given = {"host": parts.netloc, "accept": "*/*", "user-agent": "nsa-serve-bench", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        self._idle: list[Connection] = []

    async def exchange(
        self, method: str, path: str, body: Any = None, on_piece: OnPiece | None = None
    ) -> Reply:
        """Send ``body`` as JSON. Raises ``OSError`` where the server can't be reached or leaves."""
        request = self._request(method, path, body)
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, request, on_piece)
            except ConnectionError:
                # A server may close an idle connection at any time; nothing was answered yet.
                if connection.heard:
                    raise
        return await self._exchange(await self._open(), request, on_piece)

    async def _exchange(
        self, connection: Connection, request: bytes, on_piece: OnPiece | None
    ) -> Reply:
        try:
            reply = await connection.exchange(request, on_piece)
        except BaseException:
            connection.close()
            raise
        if connection.reusable and connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _open(self) -> Connection:
        connection = Connection(self.clock)
        await self._connect(lambda: connection)
        return connection

    def _request(self, method: str, path: str, body: Any) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        kind = "" if body is None else "content-type: application/json\r\n"
        return f"{head}{kind}content-length: {len(content)}\r\n\r\n".encode() + content

    def close(self) -> None:
        """Drop the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def _connector(host: str, port: int | None, scheme: str, verify: bool) -> Connect:
    context: ssl.SSLContext | None = None
    if scheme == "https":
        context = ssl.create_default_context()
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE

    async def connect(protocol: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(protocol, host, port or (443 if context else 80), ssl=context)

    return connect


def reason_of(reply: Reply) -> str:
    """Why a request was refused: the status and the server's message."""
    text = reply.body[:_ERROR_BYTES].decode("utf-8", "replace").strip()
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return f"HTTP {reply.status}: {' '.join(text.split())[:500]}"
