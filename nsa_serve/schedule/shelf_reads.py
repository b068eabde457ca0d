"""Requests that wait until pages of theirs have come from a shelf."""

from __future__ import annotations

from ..cache.manager import CacheManager
from ..request import Request, RequestStatus


class ShelfReads:
    """Reads under way, each for the request that found its pages on the shelf when it came."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._shelf = None if cache.shelving is None else cache.shelving.shelf
        self._open: dict[int, Request] = {}  # by the number of the fetch
        self._void: set[int] = set()  # fetches of what has been forgotten since

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, request: Request) -> None:
        """Have the pages read that follow what the cache holds of the request's tokens."""
        digests = self._cache.shelved(request)
        if digests and self._shelf is not None:
            self._open[self._shelf.fetch(digests)] = request

    def awaits(self, request: Request) -> bool:
        """Whether pages of the request are being read."""
        return any(other is request for other in self._open.values())

    def take_ended(self) -> list[Request]:
        """Requests whose pages are in the cache now, or could not be had."""
        if not self._open or self._shelf is None:
            return []
        ended = []
        for number, digests in self._shelf.take_fetched():
            request = self._open.pop(number)
            is_live = request.status is not RequestStatus.FINISHED
            if is_live and number not in self._void:
                self._cache.restore(request, digests)
            else:
                self._shelf.discard(digests)
                self._void.discard(number)
            if is_live:
                ended.append(request)
        return ended

    def forget(self) -> None:
        """What is being read is wanted no more; who waits for it computes it."""
        self._void.update(self._open)

    def rest(self) -> None:
        """Wait a moment: nothing can run before a read ends."""
        if self._shelf is not None:
            self._shelf.rest()
