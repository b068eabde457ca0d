"""Random operations on tiny caches: every invariant after each, and every text as if run alone."""

import random

import pytest

from nsa_serve.config import Policy

from .fake_runner import DEPTHS, Harness, draw_prompt
from .random_load import RandomLoad

OPERATIONS = 2_500  # in each of the six runs


class Fuzz(RandomLoad):
    def __init__(self, number: int, draw: random.Random, policy: Policy, depth: int) -> None:
        house = Harness(
            num_blocks=[13, 15, 18, 40][number % 4],
            page_size=draw.choice([3, 4, 5]),
            budget=draw.choice([5, 8, 16, 64]),
            depth=depth,
            policy=policy,
            max_num_seqs=5,
            max_model_len=64,
            max_num_queued_reqs=20,
            # The others take in more than the cache holds, and preempt.
            far_sighted=number % 5 < 2,
            request_timeout=draw.choice([None, None, None, 60.0]),
            interactive=draw.random() < 0.7,
        )
        super().__init__(draw, house)
        self.num_overdue = 0

    def operations(self):
        return {self.step: 60, self.add: 25, self.end_early: 4, self.fail: 1, self.reset: 1}

    def draw_options(self):
        return {
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

    def add(self) -> None:
        prompt, options = draw_prompt(self.draw), self.draw_options()
        if self.submit(prompt, options):
            for _ in range(self.draw.choice([0, 0, 0, 3])):  # more choices of the same
                self.submit(prompt, options)

    def fail(self) -> None:
        if self.live:
            self.house.runner.failing.add(self.draw.choice(sorted(self.live)))

    def step(self) -> None:
        for request in self.house.end_overdue():
            assert self.house.now >= request.arrival + request.timeout
            self.cut_short(request.request_id)
            self.num_overdue += 1
        super().step()


@DEPTHS
@pytest.mark.parametrize("policy", list(Policy))
def test_ten_thousand_random_operations_keep_every_invariant_and_every_text(policy, depth):
    draw = random.Random(f"{policy}{depth}")
    totals = {"preempted": 0, "hits": 0, "ended": 0, "overdue": 0, "late": 0}
    for number in range(10):
        fuzz = Fuzz(number, draw, policy, depth)
        fuzz.run(OPERATIONS // 10)
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
