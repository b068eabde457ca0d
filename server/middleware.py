"""What every request passes before the routes, as plain ASGI: the key and the limit on its body."""

from __future__ import annotations

import hashlib
import hmac
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import BodyTooLarge, InvalidAPIKey
from .errors import error_response
from .page import PAGE_FILES

logger = logging.getLogger("nsa_serve")

LINGER = 32 << 20  # bytes of a refused body that are still read
OPEN_PATHS = frozenset({"/health", *PAGE_FILES})


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


class BodyLimit:
    """Refuse bodies of more than ``limit`` bytes, also those that don't announce their length."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif (announced := self._announced(scope)) > self.limit:
            if announced <= self.limit + LINGER:
                await _discard(receive)
            await error_response(self._too_large())(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    def _announced(self, scope: Scope) -> int:
        length = _header(scope, b"content-length") or b""
        # Eighteen digits are too many bytes anyway, and a longer number could be refused by int().
        return int(length[:18]) if length.isdigit() else 0

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                if message.get("more_body"):
                    await _discard(receive)
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self.limit} bytes, the most taken here")


async def _discard(receive: Receive) -> None:
    """Read the rest of a body that is refused, as far as that is sensible.

    A connection closed on a client that still sends is reset, and the client may never see why.
    """
    left = LINGER
    more = True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)


class APIKeyGuard:
    """Let only requests with one of the keys pass, but for /health and the page: it knows nothing.

    Keys are compared as digests in constant time, so neither their length nor their
    beginning can be found out by measuring.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._known(scope):
            await self.app(scope, receive, send)
        else:
            error = InvalidAPIKey("send a valid key as 'Authorization: Bearer KEY'")
            await error_response(error)(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        sent = _digest(key.strip())
        # Every digest is compared, whichever matches.
        matches = [hmac.compare_digest(sent, digest) for digest in self.digests]
        return scheme.lower() == b"bearer" and any(matches)


class LastResort:
    """Answer with our nested error whatever nobody caught; the default is plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await error_response(error)(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
