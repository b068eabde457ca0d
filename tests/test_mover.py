"""Whole pages between two pools: merged copies, their order, and what waits for them."""

import mmap
import random
import threading
from collections import deque

import pytest
import torch

from nsa_serve.cache.tiers import TieredResidence, TierSizes
from nsa_serve.memory.copy_lane import SameLane
from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.host_pool import HostPool, PinnedMemory
from nsa_serve.memory.layout import KVLayout
from nsa_serve.memory.mover import BlockMover, merged
from nsa_serve.memory.tier import HostTier
from nsa_serve.schedule.plan import BlockMove, ResidenceUpdate
from tests.tiered_engine import Breaking

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim_k=8, head_dim_v=4, page=16, entries_per_page=4,
    dtype=torch.float32,
)  # fmt: skip
PAGES, HOT, HOST = 6, 2, 12
SIZES = TierSizes(PAGES, PAGES + HOT, HOST, slab=3, ahead=2)


class LateLane(SameLane):
    """Copies only what somebody waits for, and only then."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list = []

    def run(self, job, *, to_device):
        self.waiting.append((job, to_device))
        return self._last + len(self.waiting)

    def join(self, number):
        while self._last < number:
            job, to_device = self.waiting.pop(0)
            super().run(job, to_device=to_device)


def pools():
    pool = DevicePool(LAYOUT, PAGES + HOT, SIZES.num_blocks, "cpu", num_host=HOST)
    pool.poison()
    host = HostPool(LAYOUT, pool.behind)
    host.poison()
    return pool, host


def test_a_host_page_has_the_strides_and_the_bytes_of_a_device_page():
    pool, host = pools()
    assert host.num_slots == HOST
    assert host.num_bytes == HOST * LAYOUT.bytes_per_slot
    pool.pages[1] = torch.arange(LAYOUT.slot_elements)
    host.pages[2] = pool.pages[1]
    for near, far in zip(pool.kv, host.kv, strict=True):
        assert torch.equal(near.k[1], far.k[2])
        assert torch.equal(near.v[1], far.v[2])
        assert near.k.stride() == far.k.stride()


def move(block_id, source, target, to_device=False):
    return BlockMove(block_id, source, target, to_device)


def test_neighbouring_host_slots_of_a_slab_make_one_copy():
    moves = [move(0, 5, 10), move(1, 2, 11), move(2, 3, 12), move(3, 4, 13), move(4, 0, 17)]
    moves += [move(5, 17, 0, True), move(6, 18, 4, True), move(7, 13, 5, True)]
    runs = [[m.block_id for m in run] for run in merged(moves, 3, first_host=10)]
    assert runs == [[0, 1, 2], [3], [4], [5, 6], [7]]
    across = [[m.block_id for m in run] for run in merged(moves[:4], 3, first_host=11)]
    assert across == [[0], [1, 2, 3]]
    assert list(merged([], 3)) == []


def test_bytes_and_copies_are_counted_by_direction():
    pool, host = pools()
    mover = BlockMover(pool, host, SameLane(), slab=3)
    out = [move(0, 5, 8), move(1, 2, 9), move(2, 3, 10)]
    mover.start(deque(out), [])
    mover.start(deque([move(1, 9, 0, True)]), [(1, 0)])
    assert mover.counts[False].num_transfers == 1
    assert mover.counts[False].num_bytes == 3 * LAYOUT.bytes_per_slot
    assert mover.counts[True].num_bytes == LAYOUT.bytes_per_slot


def test_pages_copied_ahead_of_need_are_waited_for_only_when_they_are_read_there():
    pool, host = pools()
    lane = LateLane()
    mover = BlockMover(pool, host, lane, slab=3)
    pool.pages[:3] = torch.arange(3.0)[:, None]
    mover.start(deque(move(i, i, 8 + 2 * i) for i in range(3)), [])
    assert len(lane.waiting) == 3
    mover.start(deque(), [(1, 10)])
    assert len(lane.waiting) == 1
    assert (host.pages[2] == 1).all()
    assert host.pages[4].isnan().all()


def test_moves_that_were_broken_off_go_on_where_they_stood():
    pool, host = pools()
    tier = HostTier(pool, host, slab=3, num_hot=HOT)
    pool.pages[:2] = torch.arange(2.0)[:, None]
    first = PAGES + HOT
    # Pages 0 and 1 change places by way of the host: whichever copy came twice would undo another.
    turn = [move(0, 0, first), move(1, 1, first + 3), move(0, first, 1, True)]
    turn += [move(1, first + 3, 0, True), move(1, 0, first), move(1, first, 2, True)]
    tier.note(ResidenceUpdate(turn, [(0, 1), (1, 2)], True))
    queue = Breaking(tier._mover._queue_or_lose, MemoryError(), every=2)
    tier._mover._queue_or_lose = queue
    num_failures = 0
    while tier._due:
        try:
            tier.catch_up()
        except MemoryError:
            num_failures += 1
            assert pool.slot_table[:2].tolist() == [-1, -1]
    assert num_failures > 2
    assert pool.slot_table[:2].tolist() == [1, 2]
    assert (pool.pages[1] == 0).all()
    assert (pool.pages[2] == 1).all()


def content(block_id: int, version: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * block_id + version)
    return torch.randn(LAYOUT.slot_elements, generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_every_page_keeps_its_bytes_through_random_moves_that_come_late(seed):
    """Blocks come, fall behind, are wanted again and go; the books say where they are."""
    draw = random.Random(seed)
    pool, host = pools()
    lane = LateLane()
    tier = HostTier(pool, host, slab=SIZES.slab, num_hot=HOT, lane=lane)
    books = TieredResidence(SIZES)
    versions: dict[int, int] = {}
    pinned: set[int] = set()
    moved = 0
    for step in range(400):
        written = []
        for _ in range(draw.randrange(3)):
            kind = draw.choice(["place", "unpin", "pin", "vacate"])
            cold = sorted(set(versions) - pinned)
            if kind == "place" and len(versions) < SIZES.num_blocks and len(pinned) < PAGES - 1:
                block_id = draw.choice(sorted(set(range(SIZES.num_blocks)) - set(versions)))
                books.place(block_id)
                versions[block_id] = step
                pinned.add(block_id)
                written.append(block_id)
            elif kind == "pin" and cold and len(pinned) < PAGES - 1:
                block_id = draw.choice(cold)
                pinned.add(block_id)
                books.pin(block_id)
            elif kind == "unpin" and (old := sorted(pinned - set(written))):
                block_id = draw.choice(old)
                pinned.remove(block_id)
                books.unpin(block_id)
            elif kind == "vacate" and cold:
                block_id = draw.choice(cold)
                books.vacate(block_id)
                del versions[block_id]
        books.check()
        update = books.take_update()
        moved += len(update.moves)
        tier.note(update)
        tier.catch_up()
        for block_id in written:  # the step computes them
            if block_id in versions:
                pool.pages[books.slot(block_id)] = content(block_id, versions[block_id])
        everywhere = torch.cat([pool.pages, host.pages])
        for block_id, version in versions.items():
            slot = books.slot(block_id)
            assert int(pool.slot_table[block_id]) == slot
            assert torch.equal(everywhere[slot], content(block_id, version)), (step, block_id)
    assert moved > 50


def test_memory_is_locked_piece_by_piece_on_a_thread_of_its_own():
    asked, released = [], []

    def pin(address, num_bytes):
        assert threading.current_thread() is not threading.main_thread()
        asked.append((address, num_bytes))
        return True

    page = mmap.PAGESIZE
    memory = PinnedMemory(4 * page + 100, pin, released.append, piece=2 * page).wait()
    assert memory.numel() == 4 * page + 100
    starts = [memory.data_ptr() + at * page for at in (0, 2, 4)]
    assert starts[0] % page == 0  # so that no two pieces share a page of the system
    assert asked == list(zip(starts, [2 * page, 2 * page, 100], strict=True))
    part = memory[page:]
    del memory
    assert not released  # a view of it lives
    del part
    assert released == starts


def test_a_piece_of_locked_memory_holds_whole_copies():
    sizes = []
    pin = lambda address, num_bytes: sizes.append(num_bytes) or True  # noqa: E731
    unpin = lambda address: None  # noqa: E731
    unit = 3 * mmap.PAGESIZE // 2
    PinnedMemory(12 * unit, pin, unpin, unit=unit, piece=5 * unit).wait()
    assert sizes == [4 * unit, 4 * unit, 4 * unit]
    PinnedMemory(2 * unit, pin, unpin, unit=unit, piece=1).wait()  # never less than one
    assert sizes[3:] == [2 * unit]


def test_where_locking_is_refused_what_was_locked_is_there_and_a_line_says_so(caplog):
    answers, released = iter([True, True, False]), []
    page = mmap.PAGESIZE
    memory = PinnedMemory(
        3 * page, lambda address, num_bytes: next(answers), released.append, piece=page
    )
    assert memory.wait().numel() == 2 * page
    starts = [memory.wait().data_ptr() + at * page for at in range(2)]
    del memory
    assert released == starts
    assert f"only {2 * page} of the {3 * page} bytes of --kv-host-memory-bytes" in caplog.text
