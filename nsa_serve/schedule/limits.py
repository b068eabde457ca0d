"""Requests that must have ended by some moment, whether they wait or run."""

from __future__ import annotations

import heapq

from ..request import Request

SLACK = 64  # entries of ended requests that aren't worth a sweep


class TimeLimits:
    """Moments at which accepted requests run out of time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []  # (moment, index, id), the earliest first

    def add(self, request: Request) -> None:
        """Watch a request, if it has a time-out."""
        if request.timeout is not None:
            entry = (request.arrival + request.timeout, request.index, request.request_id)
            heapq.heappush(self._heap, entry)

    def take_due(self, now: float, live: dict[str, Request]) -> list[Request]:
        """Live requests whose time is up by ``now``. Each is returned once."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if _is_of(entry, live):
                due.append(live[entry[2]])
        if len(self._heap) > 2 * len(live) + SLACK:
            self._heap = [entry for entry in self._heap if _is_of(entry, live)]
            heapq.heapify(self._heap)
        return due


def _is_of(entry: tuple[float, int, str], live: dict[str, Request]) -> bool:
    """Whether the entry's request hasn't ended; its id may have been given anew."""
    _, index, request_id = entry
    request = live.get(request_id)
    return request is not None and request.index == index
