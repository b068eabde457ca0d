"""How fast the queue moves: tokens of prompts computed in a second, as measured."""

from __future__ import annotations

import math

MEMORY = 30.0  # seconds after which a measurement counts a third of what it did


class PrefillSpeed:
    """A mean over the last steps, the newer ones weighing more."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None before anything was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def count(self, num_tokens: int, seconds: float) -> None:
        """So many prompt tokens were computed in that time, perhaps none since others decoded."""
        weight = math.exp(-seconds / MEMORY)
        self._tokens = weight * self._tokens + num_tokens
        self._seconds = weight * self._seconds + seconds

    def seconds_for(self, num_tokens: float) -> float | None:
        """Seconds to compute so many tokens; None if that isn't known."""
        speed = self.tokens_per_s
        if speed is None:
            return None
        return num_tokens / speed if speed > 0 else math.inf
