"""When requests arrive: Poisson and gamma processes, and rates that climb."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate


class RampUp(StrEnum):
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A process of arrivals. Without a ramp every request comes at ``rate`` a second.

    ``burstiness`` is the shape of the gamma-distributed gaps: 1 is a Poisson process, less comes
    in bursts, more is steadier, and infinity is a metronome.
    """

    rate: float = math.inf  # requests/s; infinite: all at once
    burstiness: float = 1.0
    ramp: RampUp | None = None
    start_rate: float = 0.0  # of a ramp, requests/s
    end_rate: float = 0.0

    def offsets(self, count: int, rng: random.Random) -> list[float]:
        """Seconds from the start to each of ``count`` arrivals.

        Without a ramp they are stretched to end at count / rate, so that two seeds offer the same
        load. As in vLLM, the first arrival has a gap before it too.
        """
        gaps = [self._gap(self._rate_at(i, count), rng) for i in range(count)]
        times = list(accumulate(gaps))
        if self.ramp is None and times and times[-1] > 0:
            stretch = count / self.rate / times[-1]
            return [time * stretch for time in times]
        return times

    def _gap(self, rate: float, rng: random.Random) -> float:
        if math.isinf(rate):
            return 0.0
        if math.isinf(self.burstiness):
            return 1 / rate
        return rng.gammavariate(self.burstiness, 1 / (rate * self.burstiness))

    def _rate_at(self, index: int, count: int) -> float:
        if self.ramp is None:
            return self.rate
        progress = index / max(count - 1, 1)
        if self.ramp is RampUp.LINEAR:
            return self.start_rate + (self.end_rate - self.start_rate) * progress
        return float(self.start_rate * (self.end_rate / self.start_rate) ** progress)
