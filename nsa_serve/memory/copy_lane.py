"""Where copies between tiers run: beside the computation on a GPU, in its place on a CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

Job = Callable[[], None]


class CopyLane(Protocol):
    """Runs copies one after the other, each after all computation that was queued before it."""

    def run(self, job: Job, *, to_device: bool) -> int:
        """Queue a copy; the number it goes by."""

    def join(self, number: int) -> None:
        """What is computed from here on comes after the copies up to this one."""

    def finish(self) -> None:
        """Wait, on the host, for all copies."""

    @property
    def seconds(self) -> dict[bool, float]:
        """Time that finished copies took, by whether they went to the device."""

    @property
    def stall_seconds(self) -> float:
        """Time that computation waited for copies."""


class SameLane:
    """On a CPU a copy runs where it is asked for, and computation waits for all of it."""

    def __init__(self) -> None:
        self.seconds = {True: 0.0, False: 0.0}
        self._last = 0

    @property
    def stall_seconds(self) -> float:
        return sum(self.seconds.values())

    def run(self, job: Job, *, to_device: bool) -> int:
        start = perf_counter()
        job()
        self.seconds[to_device] += perf_counter() - start
        self._last += 1
        return self._last

    def finish(self) -> None:
        self.join(self._last)

    def join(self, number: int) -> None:
        assert number <= self._last, f"copy {number} was never queued"


@dataclass(frozen=True, slots=True)
class _Span:
    """Two events on one stream and what lies between them."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    to_device: bool | None  # None: computation waited


class SideLane:
    """A CUDA stream of its own. Nothing here waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._spans: deque[_Span] = deque()
        self._ends: deque[tuple[int, torch.cuda.Event]] = deque()
        self._last = 0
        self._seconds = {True: 0.0, False: 0.0}
        self._stalled = 0.0

    @property
    def seconds(self) -> dict[bool, float]:
        self._harvest()
        return self._seconds

    @property
    def stall_seconds(self) -> float:
        self._harvest()
        return self._stalled

    def run(self, job: Job, *, to_device: bool) -> int:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            start = _mark()
            job()
            end = _mark()
        self._last += 1
        self._ends.append((self._last, end))
        self._spans.append(_Span(start, end, to_device))
        return self._last

    def join(self, number: int) -> None:
        event = None
        while self._ends and self._ends[0][0] <= number:
            event = self._ends.popleft()[1]
        if event is not None and not _is_done(event):
            start = _mark()
            torch.cuda.current_stream().wait_event(event)
            self._spans.append(_Span(start, _mark(), None))

    def finish(self) -> None:
        self._stream.synchronize()

    def _harvest(self) -> None:
        while self._ends and _is_done(self._ends[0][1]):
            self._ends.popleft()
        while self._spans and _is_done(self._spans[0].end):
            span = self._spans.popleft()
            seconds = span.start.elapsed_time(span.end) / 1e3
            if span.to_device is None:
                self._stalled += seconds
            else:
                self._seconds[span.to_device] += seconds


def _mark() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
