"""The lines of a batch's input: read one at a time, bounded, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from ..errors import bounded, echo

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_CHUNK = 1 << 20
_MAX_ID = 512


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Asked(msgspec.Struct):
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that can be asked. ``number`` counts lines from 1."""

    number: int
    custom_id: str
    url: str
    body: bytes  # JSON, checked by its route


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that can't."""

    number: int
    custom_id: str | None
    code: str
    message: str


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[BatchRequest | BadLine]:
    """The lines from the file's beginning, without blank ones; never more than one is held.

    A line of more than ``max_bytes``, and each but the first of a custom_id, is a bad one.
    """
    file.seek(0)
    seen: set[str] = set()
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            _skip_line(file, line)
            yield BadLine(number, None, "line_too_long", f"the line exceeds {max_bytes} bytes")
        elif line.strip():
            yield _once(_parsed(number, line), seen)


def count_lines(file: BinaryIO) -> int:
    """Lines of the file that are not blank."""
    file.seek(0)
    count, begins = 0, True
    while piece := file.readline(_CHUNK):
        count += begins and bool(piece.strip())
        begins = piece.endswith(b"\n")
    return count


def _skip_line(file: BinaryIO, begun: bytes) -> None:
    while begun and not begun.endswith(b"\n"):
        begun = file.readline(_CHUNK)


def _once(line: BatchRequest | BadLine, seen: set[str]) -> BatchRequest | BadLine:
    if isinstance(line, BadLine):
        return line
    if line.custom_id in seen:
        shown = echo(line.custom_id)
        message = f"custom_id {shown} stands on a line before this one"
        return BadLine(line.number, line.custom_id, "duplicate_custom_id", message)
    seen.add(line.custom_id)
    return line


def _parsed(number: int, text: bytes) -> BatchRequest | BadLine:
    try:
        line = msgspec.json.decode(text, type=_Line)
        stream = _streams(line.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadLine(number, None, "invalid_json_line", bounded(str(error), 500))

    def bad(code: str, message: str) -> BadLine:
        return BadLine(number, line.custom_id[:_MAX_ID], code, message)

    if not 0 < len(line.custom_id) <= _MAX_ID:
        return bad("invalid_custom_id", f"custom_id must have 1 to {_MAX_ID} characters")
    if line.method != "POST":
        return bad("invalid_method", f"method must be POST, not {echo(line.method)}")
    if line.url not in URLS:
        return bad("invalid_url", f"url must be one of {', '.join(URLS)}, not {echo(line.url)}")
    if stream:
        return bad("invalid_request", "a batch's answers come whole; leave stream out")
    return BatchRequest(number, line.custom_id, line.url, bytes(line.body))


def _streams(body: msgspec.Raw) -> bool:
    """Whether a stream is asked for. A body of another kind is for its route to refuse."""
    try:
        return bool(msgspec.json.decode(body, type=_Asked).stream)
    except msgspec.ValidationError:
        return False
