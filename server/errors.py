"""One table from errors to HTTP: status, type and code, in OpenAI's nested, bounded body."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..errors import (
    BodyTooLarge,
    EngineDead,
    InvalidAPIKey,
    InvalidParameter,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    RequestError,
    RequestTimeout,
    ServerError,
    StepFailed,
    TraceNotFound,
    UnreadableBody,
)

MAX_ERRORS = 10
MAX_ECHO = 200
# Ten errors, each with its echo, a path and a sentence.
MAX_MESSAGE = MAX_ERRORS * (2 * MAX_ECHO + 100)

logger = logging.getLogger("nsa_serve")


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """How one class of errors looks over HTTP. ``public`` replaces messages about our insides.

    ``plain`` messages have nothing of a body in them but numbers: the log may tell them.
    """

    status: int
    type: str
    code: str | None = None
    public: str | None = None
    plain: bool = False


_INTERNAL = ErrorRow(500, "server_error", "internal_error", "internal server error")

# The first row whose class fits wins, so subclasses stand before their bases.
TABLE: tuple[tuple[type[BaseException], ErrorRow], ...] = (
    (ModelNotFound, ErrorRow(404, "invalid_request_error")),
    (TraceNotFound, ErrorRow(404, "invalid_request_error")),
    (InvalidAPIKey, ErrorRow(401, "authentication_error", plain=True)),
    (BodyTooLarge, ErrorRow(413, "invalid_request_error", plain=True)),
    (PromptTooLong, ErrorRow(400, "invalid_request_error", plain=True)),
    (UnreadableBody, ErrorRow(400, "invalid_request_error", plain=True)),
    (RequestError, ErrorRow(400, "invalid_request_error")),
    (Overloaded, ErrorRow(503, "overloaded_error", "overloaded", plain=True)),
    # Not 504: the limit is the request's own or one that holds for all, and no gateway's.
    (RequestTimeout, ErrorRow(408, "timeout_error", "request_timeout", plain=True)),
    (EngineDead, ErrorRow(500, "server_error", "engine_dead", "the engine has stopped")),
    (
        StepFailed,
        ErrorRow(500, "server_error", "step_failed", "the engine failed at this request"),
    ),
    (ServerError, _INTERNAL),
    (BaseException, _INTERNAL),
)


def row_of(error: BaseException) -> ErrorRow:
    """The row of the table that fits the error."""
    return next(row for kind, row in TABLE if isinstance(error, kind))


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's nested body: ``{"error": {"message", "type", "param", "code"}}``."""
    row = row_of(error)
    message = row.public or str(error)
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else None
    return _nested(message, row.type, param, code or row.code)


def error_response(error: BaseException) -> JSONResponse:
    """The whole answer: body, status and, if the client should come back, when (Retry-After)."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, InvalidAPIKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        # The rest of the body is not read, so the connection can't carry another request.
        headers["connection"] = "close"
    return ErrorAnswer(error_body(error), row_of(error).status, headers, reason_of(error))


class ErrorAnswer(JSONResponse):
    """An error's answer, which leaves its reason where the log finds it."""

    def __init__(
        self, body: dict[str, Any], status: int, headers: dict[str, str], reason: str
    ) -> None:
        super().__init__(body, status, headers)
        self._reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_reason(scope, self._reason)
        await super().__call__(scope, receive, send)


def note_reason(scope: Scope, reason: str) -> None:
    """Leave in a request's state why it failed."""
    scope.setdefault("state", {})["reason"] = reason


def reason_of(error: BaseException) -> str:
    """An error as the log may tell it: of a request nothing but the name of a field."""
    row = row_of(error)
    if row.public is not None or row.plain:
        return row.public or bounded(str(error).rstrip("."), MAX_ECHO)
    kind = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    # What follows in a field's path may be the client's own key.
    field = re.match(r"[a-z_]{1,64}(\[\d+\])?", getattr(error, "param", None) or "")
    return f"{kind} ({field[0]})" if field else kind


def _nested(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": bounded(message), "type": kind, "param": param, "code": code}}


def bounded(text: str, limit: int = MAX_MESSAGE) -> str:
    """Text cut to ``limit`` characters, that can be encoded as UTF-8."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return cut.encode("utf-8", "replace").decode()


def echo(value: object) -> str:
    """At most 200 characters that show what the client sent."""
    if isinstance(value, str | bytes):
        return bounded(repr(value[:MAX_ECHO]), MAX_ECHO)
    if isinstance(value, Sequence):
        return bounded(f"a list of {len(value)}", MAX_ECHO)
    if isinstance(value, dict):
        return "an object"
    return bounded(repr(value), MAX_ECHO)


def path_of(location: Sequence[int | str]) -> str:
    """A field's path as OpenAI writes it: ``messages[0].content``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{bounded(part, 64)}"
    return path.removeprefix(".")


def invalid_fields(error: ValidationError) -> InvalidParameter:
    """What pydantic found, as one error that names the first field and tells of at most ten."""
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return UnreadableBody(f"the body is not valid JSON: {_json_reason(found[0]['msg'])}")
    lines = list(_lines(found[:MAX_ERRORS]))
    if len(found) > MAX_ERRORS:
        lines.append(f"and {len(found) - MAX_ERRORS} more")
    return InvalidParameter("; ".join(lines), param=path_of(found[0]["loc"]) or None)


def _json_reason(message: str) -> str:
    return bounded(message.removeprefix("Invalid JSON: "), MAX_ECHO)


def _lines(found: Sequence[Any]) -> Iterator[str]:
    for item in found:
        where = path_of(item["loc"])
        if item["type"] == "missing":
            yield f"{where} is required"
        else:
            sent = "" if item["type"] == "value_error" else f" (got {echo(item['input'])})"
            reason = item["msg"].removeprefix("Value error, ")
            yield f"{where or 'body'}: {bounded(reason, MAX_ECHO)}{sent}"


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for our own errors and for what nobody foresaw."""
    log_failure(error, f"{request.method} {request.url.path}")
    return error_response(error)


def log_failure(error: Exception, what: str) -> None:
    """Log what is our fault: with its trace if nobody foresaw it, else in one line."""
    row = row_of(error)
    if row is _INTERNAL:
        logger.error("%s failed", what, exc_info=error)
    elif row.status >= 500 and not isinstance(error, Overloaded):
        logger.error("%s failed: %s", what, error)


async def answer_invalid_query(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for parameters of a path or a query that FastAPI itself refuses."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    message = f"{path_of(first['loc'])}: {bounded(first['msg'], MAX_ECHO)}"
    return error_response(InvalidParameter(message, param=str(first["loc"][-1])))


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for what the router says: no such path, no such method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    message = f"{phrase}: {request.method} {bounded(request.url.path, MAX_ECHO)}"
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = _nested(message, kind, None, None)
    return ErrorAnswer(body, error.status_code, dict(error.headers or {}), phrase)
