"""From the bytes of a request's body to a checked model of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..errors import UnreadableBody
from .errors import bounded, invalid_fields

T = TypeVar("T", bound="Body")
BODY_SECONDS = 60.0
MAX_NAMES = 100
MAX_NAME_CHARS = 64

logger = logging.getLogger("nsa_serve")


class Strict(BaseModel):
    """No coercion: a number in quotes is an error. Unknown names are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class Body(Strict):
    """A whole body. Unknown names are ignored here too, and kept to be told of."""

    model_config = ConfigDict(extra="allow")

    known_names: ClassVar[frozenset[str]] = frozenset()  # beside those of the fields

    @property
    def unknown_names(self) -> list[str]:
        """Of what the client set and has no meaning here."""
        extra = self.model_extra or {}
        return [n for n, value in extra.items() if value is not None and n not in self.known_names]


class UnknownNames:
    """Fields that requests had and nobody knows. The log has each once, and only so many."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def tell(self, names: list[str]) -> None:
        """Log those that are new. Any thread may call it."""
        if not names or len(self._told) >= MAX_NAMES:
            return
        with self._lock:
            shown = dict.fromkeys(repr(name[:MAX_NAME_CHARS]) for name in names)
            new = [name for name in shown if name not in self._told][: MAX_NAMES - len(self._told)]
            self._told.update(new)
            is_full = len(self._told) >= MAX_NAMES
        for name in new:
            logger.warning("requests have a field %s, which nobody here knows: ignored", name)
        if new and is_full:
            logger.warning("further fields that nobody here knows are not told of")


async def read_json_bytes(request: Request) -> bytes:
    """The body, if it says that it is JSON and comes whole; ``UnreadableBody`` if not."""
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        shown = bounded(repr(sent), 100) if sent else "none"
        raise UnreadableBody(f"content-type must be application/json, not {shown}")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise UnreadableBody(f"the body was not complete after {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise UnreadableBody("the connection was closed before the body was complete") from None


def parse(model: type[T], body: bytes) -> T:
    """The body as ``model``; ``InvalidParameter`` names every field (at most ten) that is wrong."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8 (byte {error.start})"
        raise UnreadableBody(message) from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_fields(error) from None
