"""From the bytes of a request's body to a checked model of it."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..errors import InvalidParameter
from .errors import bounded, invalid_fields

T = TypeVar("T", bound=BaseModel)
BODY_SECONDS = 60.0


class Strict(BaseModel):
    """No coercion: a number in quotes is an error. Unknown names are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


async def read_json_bytes(request: Request) -> bytes:
    """The body, if it says that it is JSON and comes whole; ``InvalidParameter`` if not."""
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        shown = bounded(repr(sent), 100) if sent else "none"
        raise InvalidParameter(f"content-type must be application/json, not {shown}")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise InvalidParameter(f"the body was not complete after {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise InvalidParameter("the connection was closed before the body was complete") from None


def parse(model: type[T], body: bytes) -> T:
    """The body as ``model``; ``InvalidParameter`` names every field (at most ten) that is wrong."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8 (byte {error.start})"
        raise InvalidParameter(message) from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_fields(error) from None
