"""Server-sent events from a stream that may be cut anywhere."""

from __future__ import annotations


class EventParser:
    """Hands out the data of each event once its closing blank line is there.

    Lines end with LF or CRLF; comments and fields other than ``data`` are dropped, as the standard
    says.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that ``piece`` completes, several lines joined by a newline."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
