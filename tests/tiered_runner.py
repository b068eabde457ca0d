"""A fake runner whose pages live in slots of two tiers and whose copies come as late as can be."""

from __future__ import annotations

from nsa_serve.cache.manager import CacheManager
from nsa_serve.cache.near import NearPages
from nsa_serve.cache.residence import BlockMove
from nsa_serve.cache.tiers import TierSizes

from .fake_runner import FakeRunner, Harness

SPACE = 1000  # host slots begin here


class TieredRunner(FakeRunner):
    """Keeps entries by slot. What nobody waited for is copied only when somebody does."""

    def __init__(self, page_size: int, sizes: TierSizes, near: NearPages) -> None:
        super().__init__(page_size)
        self.sizes, self.near = sizes, near
        self.slots: dict[int, int] = {}  # by block
        self.queue: list[BlockMove] = []
        self.num_out = self.num_in = self.num_runs = 0

    def run(self, plan):
        self._move(plan.residence)
        return super().run(plan)

    def _move(self, update) -> None:
        self.queue += update.moves
        self.num_out += sum(not move.to_device for move in update.moves)
        self.num_in += sum(move.to_device for move in update.moves)
        awaited = {slot for _, slot in update.slots if slot >= self.sizes.first_host}
        last = 0
        for at, move in enumerate(self.queue, 1):
            if move.to_device or move.target_slot in awaited:
                last = at
        for move in self.queue[:last]:
            self._copy(move.source_slot, move.target_slot)
        del self.queue[:last]
        self.slots.update(update.slots)

    def _copy(self, source: int, target: int) -> None:
        for offset in range(self.page_size):
            self.written.pop((target, offset), None)
            if (source, offset) in self.written:
                self.written[target, offset] = self.written[source, offset]

    def _compute(self, chunk, writes):
        done = super()._compute(chunk, writes)
        row = self.rows[chunk.row]
        first = max(0, chunk.start - self.near.num_tokens) // self.page_size
        held = len(row.block_ids)
        near = {*range(min(self.near.num_initial, held)), *range(first, held)}
        for page in near:
            assert self.slots[row.block_ids[page]] < self.sizes.num_device, "a near page is away"
        return done

    def _place(self, row, position):
        block_id, offset = super()._place(row, position)
        return self.slots[block_id], offset


class TieredHarness(Harness):
    """The harness with a small device tier in front of a host tier."""

    def __init__(
        self,
        *,
        num_device: int,
        num_host: int,
        slab: int = 1,
        ahead: int = 0,
        near: NearPages,
        page_size: int = 4,
        **options,
    ) -> None:
        sizes = TierSizes(num_device, SPACE, num_host, slab, ahead)
        self.sizes, self.near = sizes, near
        super().__init__(num_blocks=sizes.num_blocks, page_size=page_size, **options)
        self.runner = TieredRunner(page_size, sizes, near)

    def make_cache(self, num_blocks: int, page_size: int, prefix_caching: bool) -> CacheManager:
        return CacheManager(
            num_blocks,
            page_size,
            enable_prefix_caching=prefix_caching,
            tiers=self.sizes,
            near=self.near,
        )
