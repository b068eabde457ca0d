"""How much the running requests will still grow: what admission must leave room for.

A request that is let in too early is preempted later, and its work is done twice. One that is let
in too late leaves pages empty: few requests use up the ``max_tokens`` they ask for. So lengths of
outputs are learned from those that ended, and a request is let in if the most pages that all
will hold at once, by what is expected of each, are there. Requests that end on the way give their
pages back, and that counts too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate

from ..request import Request

WINDOW = 256  # outputs remembered
UNKNOWN = 256  # tokens expected of an output before any has ended


class OutputLengths:
    """Lengths of the last outputs that ended by themselves."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._ordered: list[int] = []
        self._sums: list[int] | None = None  # of the shortest ones; None: to be made anew

    def record(self, request: Request) -> None:
        """A request ended by its own tokens; what was cut short or forced to go on says nothing."""
        if _is_exact(request):
            return
        if len(self._recent) == WINDOW:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
        length = len(request.output_token_ids)
        self._recent.append(length)
        insort(self._ordered, length)
        self._sums = None

    def remaining(self, request: Request) -> int:
        """Tokens still expected of a request, at most those that it may give."""
        most = max(0, request.limit - request.num_tokens)
        if _is_exact(request):
            return most
        return min(most, self._beyond(len(request.output_token_ids)))

    def _beyond(self, length: int) -> int:
        """Expected tokens beyond ``length``: the mean of the outputs that were longer.

        One that is longer than all is expected to be as long again.
        """
        if not self._ordered:
            return max(UNKNOWN - length, length)
        shorter = bisect_right(self._ordered, length)
        longer = len(self._ordered) - shorter
        if not longer:
            return max(1, length)
        if self._sums is None:
            self._sums = list(accumulate(self._ordered, initial=0))
        return -(-(self._sums[-1] - self._sums[shorter]) // longer) - length


class Forecast:
    """The most pages that a set of requests will hold at once, if each grows as expected."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._rows: list[tuple[int, float]] = []  # (-remaining tokens, pages now), longest first

    def add(self, remaining: int, num_pages: float) -> None:
        """One more request, with so many tokens to come and pages for those it has."""
        insort(self._rows, (-remaining, num_pages))

    def peak(self) -> float:
        """Pages at the fullest moment, which is one at which a request ends.

        All give a token a step; whoever has fewer to come is gone by then.
        """
        held, highest = 0.0, 0.0
        for count, (negative, num_pages) in enumerate(self._rows, 1):
            held += num_pages
            highest = max(highest, held - count * negative / self._page_size)
        return highest

    def peak_with(self, remaining: int, num_pages: float) -> float:
        """The peak if one more request ran, which is not added."""
        entry = (-remaining, num_pages)
        place = bisect_left(self._rows, entry)
        self._rows.insert(place, entry)
        peak = self.peak()
        del self._rows[place]
        return peak


def _is_exact(request: Request) -> bool:
    """Whether a request ends at its limit and nowhere before, unless it is ended from outside."""
    sampling = request.sampling
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
