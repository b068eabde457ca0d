"""Evicted pages go to a shelf and come back: random loads over one tier and two keep every text."""

import random
from collections import Counter

import pytest

from nsa_serve.cache.manager import CacheManager
from nsa_serve.cache.near import NearPages
from tests.fake_runner import DEPTHS, FakeRunner, Harness
from tests.random_load import RandomLoad
from tests.tiered_runner import SPACE, TieredHarness, TieredRunner


class FakeShelf:
    """Keeps what a runner saves; fetches end late, and some pages turn out to be bad."""

    def __init__(self, draw: random.Random, page_size: int) -> None:
        self.draw, self.page_size = draw, page_size
        self.pages: dict[bytes, list] = {}
        self.read: dict[bytes, list] = {}
        self.at_hand: Counter[bytes] = Counter()
        self.under_way: list[tuple[int, list[bytes]]] = []
        self.num_fetches = self.num_bad = self.num_saved = self.num_loaded = 0

    def __contains__(self, digest):
        return digest in self.pages

    def fetch(self, digests):
        assert digests
        self.num_fetches += 1
        self.under_way.append((self.num_fetches, list(digests)))
        return self.num_fetches

    def take_fetched(self):
        ended = [fetch for fetch in self.under_way if self.draw.random() < 0.4]
        self.under_way = [fetch for fetch in self.under_way if fetch not in ended]
        return [(number, self._read(digests)) for number, digests in ended]

    def _read(self, digests):
        found = []
        for digest in digests:
            if digest not in self.pages or self.draw.random() < 0.1:
                self.num_bad += 1
                self.pages.pop(digest, None)
                break
            self.read[digest] = self.pages[digest]
            found.append((digest, self.pages[digest]))
        self.at_hand.update(digest for digest, _ in found)
        return [digest for digest, _ in found]

    def discard(self, digests):
        self.at_hand.subtract(digests)
        assert min(self.at_hand.values(), default=0) >= 0

    def clear(self):
        self.pages.clear()

    def save(self, written, page):
        slots = ((page.slot, offset) for offset in range(self.page_size))
        self.pages[page.digest] = [written[place] for place in slots]
        self.num_saved += 1

    def load(self, written, page):
        assert self.at_hand[page.digest] > 0, "a page arrives that nobody has fetched"
        self.discard([page.digest])
        for offset, entry in enumerate(self.read[page.digest]):
            written[page.slot, offset] = entry
        self.num_loaded += 1


class _Saves:
    """What a runner does with a plan's pages, before and after it moves others."""

    def run(self, plan):
        if any(page.slot >= SPACE for page in plan.departing):
            self.settle()
        for page in plan.departing:
            self.shelf.save(self.written, page)
        self.arriving = plan.arriving
        if plan.residence is None:
            self.load_arriving()
        return super().run(plan)

    def load_arriving(self):
        for page in self.arriving:
            self.shelf.load(self.written, page)


class ShelvedRunner(_Saves, FakeRunner):
    pass


class ShelvedTieredRunner(_Saves, TieredRunner):
    def settle(self):
        for move in self.queue:
            self._copy(move.source_slot, move.target_slot)
        self.queue.clear()

    def _move(self, update):
        super()._move(update)
        self.load_arriving()


class OneTier(Harness):
    def __init__(self, shelf, **options):
        self.shelf = shelf
        super().__init__(num_blocks=18, **options)
        self.runner = ShelvedRunner(options["page_size"])
        self.runner.shelf = shelf

    def make_cache(self, num_blocks, page_size, prefix_caching):
        return CacheManager(num_blocks, page_size, shelf=self.shelf)


class TwoTiers(TieredHarness):
    def __init__(self, shelf, **options):
        self.shelf = shelf
        near = NearPages(1, 7)
        super().__init__(num_device=14, num_host=8, slab=2, ahead=2, near=near, **options)
        self.runner = ShelvedTieredRunner(options["page_size"], self.sizes, near)
        self.runner.shelf = shelf

    def make_cache(self, num_blocks, page_size, prefix_caching):
        return CacheManager(
            num_blocks, page_size, tiers=self.sizes, near=self.near, shelf=self.shelf
        )


class Load(RandomLoad):
    """Requests that share prefixes, over pages that come and go."""

    def __init__(self, draw, kind, depth):
        page_size = draw.choice([3, 4])
        self.shelf = FakeShelf(draw, page_size)
        house = kind(
            self.shelf, page_size=page_size, budget=8, depth=depth, max_num_seqs=5,
            max_model_len=64,
        )  # fmt: skip
        super().__init__(draw, house)

    def operations(self):
        return {self.step: 70, self.add: 25, self.end_early: 4, self.reset: 0.3}

    def draw_options(self):
        return {
            "seed": self.draw.randrange(3), "max_tokens": self.draw.randrange(1, 12),
            "salt": self.draw.choice(["", "", "s"]),
        }  # fmt: skip


@DEPTHS
@pytest.mark.parametrize("kind", [OneTier, TwoTiers])
def test_random_loads_keep_every_text_with_pages_that_come_and_go(kind, depth):
    draw = random.Random(f"shelf{kind.__name__}{depth}")
    totals = Counter()
    for _ in range(8):
        load = Load(draw, kind, depth)
        load.run(150)
        shelf = load.shelf
        for _ in range(50):  # fetches of those that ended early
            load.house.scheduler._roster.reads.take_ended()
        assert not shelf.under_way
        arriving = Counter(load.house.cache.shelving.arriving.values())
        assert +shelf.at_hand == arriving, "pages at hand that nobody takes"
        totals.update(saved=shelf.num_saved, loaded=shelf.num_loaded, bad=shelf.num_bad)
        totals.update(fetches=shelf.num_fetches)
    assert min(totals.values()) > 8, totals


@pytest.mark.parametrize("when", ["read", "under way"])
def test_what_is_being_read_at_a_reset_is_computed(when):
    draw = random.Random(0)
    shelf = FakeShelf(draw, 4)
    house = OneTier(shelf, page_size=4, max_model_len=64)
    prompt = [1 + i % 7 for i in range(33)]
    house.add("first", prompt, max_tokens=2)
    house.drain()
    for i in range(4):  # push it out
        house.add(f"other{i}", [20 + i] * 40, max_tokens=2)
        house.drain()
    house.add("again", prompt, max_tokens=2)
    assert house.scheduler.awaits_pages
    if when == "read":
        digests = [digest for _, fetch in shelf.under_way for digest in fetch]
        shelf.read.update((digest, shelf.pages[digest]) for digest in digests)
        shelf.at_hand.update(digests)
        ended = iter([[(1, digests)]])
        shelf.take_fetched = lambda: next(ended, [])
    house.scheduler.reset_prefix_cache()
    before = house.runner.num_computed_tokens
    house.drain()
    assert house.runner.num_computed_tokens - before >= len(prompt)
    assert shelf.num_loaded == 0
    assert not +shelf.at_hand
