"""Random requests and endings over a fake runner: each text stays as if run alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from nsa_serve.errors import Overloaded, PromptTooLong
from nsa_serve.request import EngineRequest, FinishReason

from .fake_runner import Harness, draw_prompt, make_request, run_alone


class RandomLoad:
    """What is done to a scheduler, operation by operation; subclasses say to which, and how often.

    Invariants and texts are checked as soon as they can be.
    """

    def __init__(self, draw: random.Random, house: Harness) -> None:
        self.draw = draw
        self.house = house
        self.requests: dict[str, EngineRequest] = {}
        self.live: set[str] = set()

    def draw_options(self) -> dict[str, Any]:
        """Of ``make_request``, for the next request; with a seed."""
        raise NotImplementedError

    def operations(self) -> dict[Callable[[], None], float]:
        """What may come next, by how often it does."""
        raise NotImplementedError

    def run(self, num_operations: int) -> None:
        """So many operations, then steps until nothing is left."""
        operations = self.operations()
        for operate in self.draw.choices([*operations], [*operations.values()], k=num_operations):
            operate()
        while self.house.scheduler.has_work:
            self.step()
        self.house.drain()
        assert not self.live

    def add(self) -> None:
        self.submit(draw_prompt(self.draw), self.draw_options())

    def submit(self, prompt: list[int], options: dict[str, Any]) -> bool:
        """Whether the request was let in."""
        request_id = f"r{len(self.requests)}"
        try:
            self.house.add(request_id, prompt, **options)
        except (Overloaded, PromptTooLong):
            return False
        self.requests[request_id] = make_request(request_id, prompt, **options)
        self.live.add(request_id)
        return True

    def end_early(self) -> None:
        if not self.live:
            return
        request_id = self.draw.choice(sorted(self.live))
        reason = self.draw.choice([FinishReason.ABORT, FinishReason.STOP])
        assert self.house.scheduler.finish(request_id, reason, self.house.now) is not None
        self.house.scheduler.check()
        self.cut_short(request_id)

    def cut_short(self, request_id: str) -> None:
        """It was ended from outside: it gave the first tokens of those that it would have given."""
        self.live.remove(request_id)
        got = self.house.outputs[request_id]
        assert got == self.expected(request_id)[: len(got)]

    def reset(self) -> None:
        self.house.scheduler.reset_prefix_cache()
        self.house.scheduler.check()

    def step(self) -> None:
        self.house.step()
        for request_id in [r for r in self.live if self.house.is_ended(r)]:
            self.live.remove(request_id)
            got, expected = self.house.outputs[request_id], self.expected(request_id)
            if self.house.reason(request_id) is FinishReason.ERROR:
                expected = expected[: len(got)]
            assert got == expected, request_id

    def expected(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        assert request.sampling.seed is not None
        return run_alone(request, request.sampling.seed)
