"""Requests running and waiting during a load, as the server's metrics page tells them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from .http import HTTPClient

_GAUGE = re.compile(
    r"^[a-zA-Z_]\w*:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)"
    r"(?:\{[^}]*\})? ([0-9.eE+-]+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Gauges:
    """One look at the server, ``at`` seconds of the client's clock."""

    at: float
    running: float
    waiting: float
    cache_usage: float | None = None  # 0 to 1


def read_gauges(page: str, at: float) -> Gauges | None:
    """The gauges of a metrics page in vLLM's names, whatever the prefix; None without them.

    Several engines behind one page are added up; their cache usage is averaged.
    """
    found: dict[str, list[float]] = {}
    for name, value in _GAUGE.findall(page):
        found.setdefault(name, []).append(float(value))
    if not {"num_requests_running", "num_requests_waiting"} <= found.keys():
        return None
    usage = found.get("kv_cache_usage_perc")
    return Gauges(
        at,
        sum(found["num_requests_running"]),
        sum(found["num_requests_waiting"]),
        sum(usage) / len(usage) if usage else None,
    )


class GaugeWatch:
    """Looks at ``/metrics`` every ``interval`` seconds, until it is cancelled.

    A server without that page, or without these gauges, is asked once.
    """

    def __init__(self, client: HTTPClient, interval: float) -> None:
        self._client = client
        self._interval = interval
        self.seen: list[Gauges] = []

    async def run(self) -> None:
        while await self._look():
            await asyncio.sleep(self._interval)

    async def _look(self) -> bool:
        try:
            reply = await self._client.exchange("GET", "/metrics")
        except OSError:
            return False
        page = reply.body.decode("utf-8", "replace") if reply.status == 200 else ""
        found = read_gauges(page, self._client.clock())
        if found is not None:
            self.seen.append(found)
        return found is not None
