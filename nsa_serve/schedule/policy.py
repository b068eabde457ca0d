"""Who runs first: for each request a moment, fixed at its arrival; the earliest goes first.

The moment lies at most ``MAX_SHIFT`` seconds from the arrival, whatever the request asks for.
That is the ageing: a request stands only behind those that come less than 2 · ``MAX_SHIFT``
seconds after it. The first in the order gets a token of each step and is never preempted, so
nobody starves.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import Policy
from ..request import Request

MAX_SHIFT = 300.0  # seconds
# A priority of so many levels is worth half of MAX_SHIFT; levels near 0 are worth 33 s and less.
HALF_LEVELS = 8

Key = tuple[float, int]
Order = Callable[[Request], Key]


def by_arrival(request: Request) -> Key:
    return request.arrival, request.index


def by_priority(request: Request) -> Key:
    """Lower values go first: each level counts as having come some seconds earlier or later."""
    level = request.priority
    return request.arrival + MAX_SHIFT * level / (HALF_LEVELS + abs(level)), request.index


def by_deadline(request: Request) -> Key:
    """The nearest deadline goes first; none, or a far one, counts as ``MAX_SHIFT`` seconds."""
    wish = MAX_SHIFT if request.deadline is None else min(request.deadline, MAX_SHIFT)
    return request.arrival + wish, request.index


ORDERS: dict[Policy, Order] = {
    Policy.FCFS: by_arrival,
    Policy.PRIORITY: by_priority,
    Policy.DEADLINE: by_deadline,
}
