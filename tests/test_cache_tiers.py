"""Two tiers decided on the CPU: what spills, what stays, and that no content is ever lost."""

import random

import pytest

from nsa_serve.cache.host_slots import HostSlots
from nsa_serve.cache.near import NearPages
from nsa_serve.cache.tiers import TieredResidence, TierSizes
from nsa_serve.config import Policy

from .fake_runner import DEPTHS, make_request, run_alone
from .random_load import RandomLoad
from .tiered_runner import TieredHarness

HOST = 100


def residence(num_device=4, num_host=8, slab=2, ahead=0) -> TieredResidence:
    return TieredResidence(TierSizes(num_device, HOST, num_host, slab, ahead))


def placed(blocks, **sizes) -> TieredResidence:
    """Blocks that were written and have fallen behind."""
    tiers = residence(**sizes)
    for block_id in blocks:
        tiers.place(block_id)
        tiers.unpin(block_id)
    return tiers


def moves_of(tiers):
    update = tiers.take_update()
    tiers.check()
    return [(m.block_id, m.source_slot, m.target_slot) for m in update.moves], dict(update.slots)


def test_pages_stay_on_the_device_while_there_is_room():
    tiers = placed(range(4))
    assert moves_of(tiers) == ([], {0: 0, 1: 1, 2: 2, 3: 3})
    assert not tiers.num_spilled


def test_under_pressure_the_oldest_page_leaves_and_a_slab_leaves_with_it():
    tiers = placed(range(5))
    moves, slots = moves_of(tiers)
    assert moves == [(0, 0, HOST), (1, 1, HOST + 1)]
    assert slots == {0: HOST, 1: 1, 2: 2, 3: 3, 4: 0}
    assert tiers.num_spilled == 1
    assert tiers.spilled() == [0]


def test_a_page_with_a_copy_gives_its_slot_without_another_copy():
    tiers = placed(range(5))
    tiers.take_update()
    tiers.place(5)
    assert moves_of(tiers) == ([], {1: HOST + 1, 5: 1})


def test_pages_that_nobody_holds_leave_first():
    tiers = placed(range(4), slab=1)
    tiers.rest(2)
    tiers.place(4)
    assert moves_of(tiers)[0] == [(2, 2, HOST)]


def test_a_page_that_is_held_again_leaves_in_its_turn():
    tiers = placed(range(4), slab=1)
    tiers.rest(2)
    tiers.wake(2)
    tiers.place(4)
    assert moves_of(tiers)[0] == [(0, 0, HOST)]


def test_pinned_pages_stay_and_come_back():
    tiers = residence(slab=1)
    for block_id in range(5):
        tiers.place(block_id)
        if block_id != 1:
            tiers.unpin(block_id)
    tiers.take_update()
    tiers.pin(0)
    moves, slots = moves_of(tiers)
    assert moves == [(2, 2, HOST + 1), (0, HOST, 2)]
    assert slots == {2: HOST + 1, 0: 2}
    assert tiers.slot(1) == 1


def test_pages_are_copied_ahead_of_need_and_read_where_they_are():
    tiers = placed(range(3), ahead=3)
    moves, slots = moves_of(tiers)
    assert [move[0] for move in moves] == [0, 1]
    assert slots == {0: 0, 1: 1, 2: 2}
    assert not tiers.num_spilled


def test_a_block_that_ends_before_its_copy_began_is_not_copied():
    tiers = placed(range(3), ahead=3, slab=1)
    tiers._copy_out()
    tiers.vacate(0)
    assert [move[0] for move in moves_of(tiers)[0]] == [1]


def test_all_blocks_of_both_tiers_can_be_placed_and_every_one_can_come_back():
    tiers = placed(range(11), num_device=4, num_host=8, slab=4, ahead=2)
    tiers.check()
    for block_id in range(11):
        tiers.pin(block_id)
        assert tiers.slot(block_id) < 4
        tiers.unpin(block_id)
        tiers.check()


def test_host_slots_come_in_whole_slabs_while_there_are_any():
    slots = HostSlots(8, 4)
    assert slots.take(4) == [0, 1, 2, 3]
    assert slots.take(2) == [4, 5]
    slots.give(2)
    slots.give(0)
    assert slots.take(4) in ([0, 2], [6, 7])
    for slot in (1, 3, *range(4, 8)):
        if slot not in slots.free():
            slots.give(slot)
    assert slots.num_free == len(slots.free())


def test_what_a_request_reads_directly_is_pinned_and_slides_with_it():
    house = TieredHarness(num_device=6, num_host=16, near=NearPages(1, 4), budget=8)
    house.add("a", list(range(1, 40)), max_tokens=4, ignore_eos=True)
    house.drain()
    assert house.runner.num_out > 0
    expected = run_alone(make_request("a", list(range(1, 40)), max_tokens=4, ignore_eos=True), 0)
    assert len(house.outputs["a"]) == len(expected) == 4


def test_a_preempted_requests_pages_wait_in_host_memory():
    house = TieredHarness(num_device=14, num_host=60, near=NearPages(1, 12), budget=16)
    first = house.add("r0", [i % 9 + 1 for i in range(33)], max_tokens=30, ignore_eos=True)
    while len(house.outputs["r0"]) < 10:
        house.step()
    house.scheduler._roster.preempt(first, 0)
    for i in range(1, 4):
        house.add(f"r{i}", [i * 10 + j % 9 + 1 for j in range(33)], max_tokens=30, ignore_eos=True)
    house.drain()
    assert house.runner.num_out > 0
    recomputed = house.runner.num_computed_tokens - 4 * (33 + 29)
    # All that the preemption costs is the page that was not full, and the token behind a full one.
    assert recomputed <= 5


def test_as_many_requests_run_as_their_near_pages_fit_on_the_device():
    house = TieredHarness(num_device=19, num_host=90, near=NearPages(1, 12), budget=16)
    for i in range(6):
        house.add(f"r{i}", [i * 7 + j % 9 + 1 for j in range(40)], max_tokens=20, ignore_eos=True)
    running = set()
    while house.scheduler.has_work:
        house.step()
        running.add(house.scheduler.num_running)
    assert max(running) == 3  # of 1 + 3 + 1 pages each, beside the 4 of a step
    assert house.scheduler.snapshot().num_preemptions == 0


class Fuzz(RandomLoad):
    """Over a device tier of a few pages."""

    def __init__(self, draw: random.Random, policy: Policy, depth: int) -> None:
        page, near, budget = draw.choice([3, 4]), draw.choice([2, 7]), draw.choice([5, 8])
        slab = draw.choice([1, 2, 4])
        house = TieredHarness(
            num_device=draw.choice([10, 14]),
            num_host=draw.choice([4, 12, 40]) * slab,
            slab=slab,
            ahead=draw.choice([0, 2, 5]),
            near=NearPages(draw.choice([0, 1]), near),
            page_size=page,
            budget=budget,
            depth=depth,
            policy=policy,
            max_num_seqs=5,
            max_model_len=64,
            max_num_queued_reqs=20,
        )
        super().__init__(draw, house)

    def operations(self):
        return {self.step: 60, self.add: 25, self.end_early: 4, self.preempt: 4, self.reset: 1}

    def draw_options(self):
        return {
            "seed": self.draw.randrange(3),
            "max_tokens": self.draw.randrange(1, 24),
            "ignore_eos": self.draw.random() < 0.6,
            "priority": self.draw.randrange(3),
        }

    def preempt(self) -> None:
        roster = self.house.scheduler._roster
        if roster.running:
            roster.preempt(self.draw.choice(roster.running), 0)
            self.house.scheduler.check()


@DEPTHS
@pytest.mark.parametrize("policy", list(Policy))
def test_random_operations_over_two_tiers_keep_every_page_and_every_text(policy, depth):
    draw = random.Random(f"tiers{policy}{depth}")
    totals = {"preempted": 0, "hits": 0, "out": 0, "in": 0}
    for _ in range(10):
        fuzz = Fuzz(draw, policy, depth)
        fuzz.run(120)
        stats = fuzz.house.scheduler.snapshot()
        totals["preempted"] += stats.num_preemptions
        totals["hits"] += stats.prefix_hits
        totals["out"] += fuzz.house.runner.num_out
        totals["in"] += fuzz.house.runner.num_in
    assert min(totals.values()) > 20, totals
