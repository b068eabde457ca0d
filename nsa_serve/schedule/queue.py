"""Requests that wait: for room, in the policy's order, or for a page that another one computes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ..request import Request, RequestStatus
from .policy import Key, Order


class WaitingQueue:
    """A heap of requests, and beside it those parked on a page.

    A request that ends while it waits is passed over when its turn comes.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._heap: list[tuple[Key, Request]] = []
        self._parked: dict[bytes, list[Request]] = {}
        self._num_ended = 0  # since the last sweep, met or not

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (self._order(request), request))

    def peek(self) -> Request | None:
        """The request whose turn it is, left in place; None if nobody waits for room."""
        while self._heap and self._heap[0][1].status is RequestStatus.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take out what ``peek`` has just shown."""
        return heapq.heappop(self._heap)[1]

    def park(self, digest: bytes) -> None:
        """The first in the queue waits for a page instead, until ``wake`` names it."""
        self._parked.setdefault(digest, []).append(self.pop())

    def wake(self, digests: Iterable[bytes]) -> None:
        """The pages came, or won't come: whoever waited for them queues again."""
        for digest in digests:
            for request in self._parked.pop(digest, ()):
                self.push(request)

    def forget(self) -> None:
        """One that waits has ended. Sweeps now and then, so that prompts of the ended go too."""
        self._num_ended += 1
        if 2 * self._num_ended <= len(self._heap):
            return
        self._num_ended = 0
        self._heap = [entry for entry in self._heap if _is_live(entry[1])]
        heapq.heapify(self._heap)

    def parked_on(self) -> set[bytes]:
        return {d for d, requests in self._parked.items() if any(map(_is_live, requests))}

    def live(self) -> list[Request]:
        """Everybody who still waits here, in no order."""
        parked = (request for requests in self._parked.values() for request in requests)
        return [r for r in (*(entry[1] for entry in self._heap), *parked) if _is_live(r)]


def _is_live(request: Request) -> bool:
    return request.status is not RequestStatus.FINISHED
