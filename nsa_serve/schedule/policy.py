"""Who runs first: a key for each request, the smallest before the others."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Policy
from ..request import Request

Key = tuple[int, float, int]
Order = Callable[[Request], Key]


def by_arrival(request: Request) -> Key:
    return 0, request.arrival, request.index


def by_priority(request: Request) -> Key:
    return request.priority, request.arrival, request.index


ORDERS: dict[Policy, Order] = {Policy.FCFS: by_arrival, Policy.PRIORITY: by_priority}
