"""Random operations on tiny caches: every invariant after each, and every text as if run alone."""

import random

import pytest

from nsa_serve.config import Policy
from nsa_serve.errors import Overloaded, PromptTooLong
from nsa_serve.request import FinishReason

from .fake_runner import DEPTHS, Harness, draw_prompt, make_request, run_alone

OPERATIONS = 2_500  # in each of the six runs


class Fuzz:
    def __init__(self, draw: random.Random, policy: Policy, depth: int) -> None:
        self.draw = draw
        self.house = Harness(
            num_blocks=draw.choice([13, 15, 18, 40]),
            page_size=draw.choice([3, 4, 5]),
            budget=draw.choice([5, 8, 16, 64]),
            depth=depth,
            policy=policy,
            max_num_seqs=5,
            max_model_len=64,
            max_num_queued_reqs=20,
            # The other runs take in more than the cache holds, and preempt.
            far_sighted=draw.random() < 0.4,
            request_timeout=draw.choice([None, None, None, 60.0]),
            interactive=draw.random() < 0.7,
        )
        self.requests: dict[str, object] = {}
        self.live: set[str] = set()
        self.num_overdue = 0

    def add(self) -> None:
        request_id = f"r{len(self.requests)}"
        sampling = {
            "seed": self.draw.randrange(3),
            "max_tokens": self.draw.randrange(1, 32),
            "min_tokens": self.draw.choice([0, 0, 5]),
            "ignore_eos": self.draw.random() < 0.6,
            "stop_token_ids": self.draw.choice([(), (), (3,), (3, 4)]),
            "prompt_logprobs": self.draw.choice([None, None, None, 1]),
            "priority": self.draw.choice([0, 1, 2, -(1 << 31), 1 << 30]),
            "deadline": self.draw.choice([None, None, 3.0, 30.0, 1e6]),
            "timeout": self.draw.choice([None] * 9 + [1.5, 12.0]),
            "salt": self.draw.choice(["", "", "", "tenant"]),
        }
        prompt = draw_prompt(self.draw)
        try:
            self.house.add(request_id, prompt, **sampling)
        except (Overloaded, PromptTooLong):
            return
        self.requests[request_id] = make_request(request_id, prompt, **sampling)
        self.live.add(request_id)
        for _ in range(self.draw.choice([0, 0, 0, 3])):
            self.choice(prompt, sampling)

    def choice(self, prompt, sampling) -> None:
        request_id = f"r{len(self.requests)}"
        try:
            self.house.add(request_id, prompt, **sampling)
        except Overloaded:
            return
        self.requests[request_id] = make_request(request_id, prompt, **sampling)
        self.live.add(request_id)

    def end_early(self) -> None:
        if not self.live:
            return
        request_id = self.draw.choice(sorted(self.live))
        reason = self.draw.choice([FinishReason.ABORT, FinishReason.STOP])
        assert self.house.scheduler.finish(request_id, reason, self.house.now) is not None
        self.live.remove(request_id)
        self.house.scheduler.check()
        self.check_beginning(request_id)

    def check_beginning(self, request_id: str) -> None:
        """One that was cut short gave the first tokens of those that it would have given."""
        got = self.house.outputs[request_id]
        assert got == self.expected(request_id)[: len(got)]

    def fail(self) -> None:
        if self.live:
            self.house.runner.failing.add(self.draw.choice(sorted(self.live)))

    def step(self) -> None:
        for request in self.house.end_overdue():
            assert self.house.now >= request.arrival + request.timeout
            self.live.remove(request.request_id)
            self.num_overdue += 1
            self.check_beginning(request.request_id)
        self.house.step()
        self.settle()

    def settle(self) -> None:
        for request_id in [r for r in self.live if self.house.is_ended(r)]:
            self.live.remove(request_id)
            got, expected = self.house.outputs[request_id], self.expected(request_id)
            if self.house.reason(request_id) is FinishReason.ERROR:
                expected = expected[: len(got)]
            assert got == expected, request_id

    def expected(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        return run_alone(request, request.sampling.seed)

    def operate(self) -> None:
        kind = self.draw.choices(
            [self.step, self.add, self.end_early, self.fail, self.reset], [60, 25, 4, 1, 1]
        )[0]
        kind()

    def reset(self) -> None:
        self.house.scheduler.reset_prefix_cache()
        self.house.scheduler.check()


@DEPTHS
@pytest.mark.parametrize("policy", list(Policy))
def test_ten_thousand_random_operations_keep_every_invariant_and_every_text(policy, depth):
    draw = random.Random(f"{policy}{depth}")
    totals = {"preempted": 0, "hits": 0, "ended": 0, "overdue": 0, "late": 0}
    for _ in range(10):
        fuzz = Fuzz(draw, policy, depth)
        for _ in range(OPERATIONS // 10):
            fuzz.operate()
        while fuzz.house.scheduler.has_work:
            fuzz.step()
        fuzz.house.drain()
        assert not fuzz.live
        stats = fuzz.house.scheduler.snapshot()
        assert sum(stats.num_finished.values()) == len(fuzz.requests)
        totals["preempted"] += stats.num_preemptions
        totals["hits"] += stats.prefix_hits
        totals["ended"] += len(fuzz.requests)
        totals["overdue"] += fuzz.num_overdue
        totals["late"] += stats.num_late
        assert stats.num_finished["timeout"] == fuzz.num_overdue
    # The run is worth something only if it met what it is about.
    assert min(totals.values()) > 30, totals
