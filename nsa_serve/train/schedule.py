"""How far a run is, by steps or by the clock, and the learning rate there."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """A run ends after ``steps`` or after ``seconds``, whichever comes first."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 at the end."""
        shares = []
        if self.steps is not None:
            shares.append(step / max(1, self.steps))
        if self.seconds is not None:
            shares.append(seconds / self.seconds)
        return min(1.0, max(shares, default=0.0))


def rate(progress: float, *, warmup: float = 0.04, floor: float = 0.05) -> float:
    """Factor on the learning rate: a linear rise, then half a cosine down to ``floor``."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    along = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))
