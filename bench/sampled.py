"""``python -m nsa_serve.bench.sampled FILE serve ...``: the command line, its time sampled.

From one SIGUSR2 to the next, every millisecond of processor time the main thread's stack is noted;
FILE gets, as JSON, the share of samples in which each function was running, and in which it was
anywhere on the stack.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from ..server.cli import main

INTERVAL = 0.001  # seconds of processor time
NUM_SHOWN = 25


class Sampler:
    """Counts functions on the stack between two signals."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._samples = False
        self._running: Counter[str] = Counter()
        self._on_stack: Counter[str] = Counter()

    def install(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR2, self._toggle)

    def _toggle(self, number: int, frame: FrameType | None) -> None:
        self._samples = not self._samples
        interval = INTERVAL if self._samples else 0
        signal.setitimer(signal.ITIMER_PROF, interval, interval)

    def report(self) -> dict[str, object]:
        return {
            "num_samples": self.num_samples,
            "running": self._shares(self._running),
            "on_stack": self._shares(self._on_stack),
        }

    def _shares(self, counts: Counter[str]) -> dict[str, float]:
        total = max(1, self.num_samples)
        return {name: round(n / total, 4) for name, n in counts.most_common(NUM_SHOWN)}

    def _sample(self, number: int, frame: FrameType | None) -> None:
        self.num_samples += 1
        if frame is not None:
            self._running[_name(frame)] += 1
        names = set()
        while frame is not None:
            names.add(_name(frame))
            frame = frame.f_back
        self._on_stack.update(names)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_qualname}"


if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    sampler = Sampler()
    sampler.install()
    try:
        main()
    finally:
        target.write_text(json.dumps(sampler.report()))
