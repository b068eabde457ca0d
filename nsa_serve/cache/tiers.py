"""Residence over two tiers: pages live on the device while there is room, then in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from .host_slots import HostSlots
from .residence import ABSENT, BlockMove, Residence, ResidenceUpdate


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Slots of both tiers. Device pages are slots 0 …, host pages follow from ``first_host`` on.

    Slots between the two belong to others (the device's hot blocks). ``slab`` host pages make one
    copy; ``ahead`` is how many device slots are kept free, or held by pages that have been copied.
    """

    num_device: int
    first_host: int
    num_host: int
    slab: int
    ahead: int

    @property
    def num_blocks(self) -> int:
        """Blocks that both tiers hold. One place is spare, so that two pages can change places."""
        return self.num_device + self.num_host - 1


class TieredResidence(Residence):
    """Slots of blocks on a device and in host memory; a pinned block is on the device.

    A block is only unpinned once its page isn't written any more. Device slots that run short are
    refilled by copying unpinned pages out ahead of need: such a page is read from the device until
    its slot is wanted. Those that nobody holds go first, then those unpinned longest ago.
    """

    def __init__(self, sizes: TierSizes) -> None:
        self.sizes = sizes
        self._device = [ABSENT] * sizes.num_blocks
        self._host = [ABSENT] * sizes.num_blocks
        self._pins = [0] * sizes.num_blocks
        self._num_pinned = 0
        self._num_spilled = 0
        self._free = list(range(sizes.num_device - 1, -1, -1))
        self._free_host = HostSlots(sizes.num_host, sizes.slab)
        # Unpinned blocks on the device, oldest first: only there, those held by nobody, and those
        # with a copy in host memory.
        self._cold: OrderedDict[int, None] = OrderedDict()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._copied: OrderedDict[int, None] = OrderedDict()
        self._moves: list[BlockMove] = []
        self._changed: dict[int, int] = {}

    @property
    def num_places(self) -> int:
        return self.sizes.num_device

    @property
    def room(self) -> int:
        return self.sizes.num_device - self._num_pinned

    @property
    def num_spilled(self) -> int:
        """Blocks in host memory alone."""
        return self._num_spilled

    def spilled(self) -> list[int]:
        places = zip(self._device, self._host, strict=True)
        return [
            block_id
            for block_id, (device, host) in enumerate(places)
            if device == ABSENT and host != ABSENT
        ]

    def slot(self, block_id: int) -> int:
        if self._device[block_id] != ABSENT:
            return self._device[block_id]
        return self._host[block_id]

    def is_pinned(self, block_id: int) -> bool:
        return self._pins[block_id] > 0

    def place(self, block_id: int) -> None:
        assert self.slot(block_id) == ABSENT, f"block {block_id} has a slot already"
        self._pins[block_id] = 1
        self._num_pinned += 1
        self._settle(block_id, self._take_device())

    def vacate(self, block_id: int) -> None:
        assert not self._pins[block_id], f"block {block_id} is pinned"
        for order in (self._cold, self._idle, self._copied):
            order.pop(block_id, None)
        self._moves = [move for move in self._moves if move.block_id != block_id]
        self._changed.pop(block_id, None)
        if self._device[block_id] != ABSENT:
            self._free.append(self._device[block_id])
            self._device[block_id] = ABSENT
        else:
            self._num_spilled -= 1
        if self._host[block_id] != ABSENT:
            self._drop_host(block_id)

    def pin(self, block_id: int) -> None:
        self._pins[block_id] += 1
        if self._pins[block_id] > 1:
            return
        self._num_pinned += 1
        for order in (self._cold, self._idle, self._copied):
            order.pop(block_id, None)
        if self._device[block_id] == ABSENT:
            self._promote(block_id)
        if self._host[block_id] != ABSENT:
            self._drop_host(block_id)

    def unpin(self, block_id: int) -> None:
        self._pins[block_id] -= 1
        assert self._pins[block_id] >= 0, f"block {block_id} is unpinned too often"
        if not self._pins[block_id]:
            self._num_pinned -= 1
            self._cold[block_id] = None

    def rest(self, block_id: int) -> None:
        if block_id in self._cold:
            del self._cold[block_id]
            self._idle[block_id] = None

    def rests(self, block_id: int) -> bool:
        return block_id in self._idle

    def wake(self, block_id: int) -> None:
        if block_id in self._idle:
            del self._idle[block_id]
            self._cold[block_id] = None

    def is_moving(self, block_id: int) -> bool:
        return any(move.block_id == block_id for move in self._moves)

    def take_update(self) -> ResidenceUpdate:
        """What changed since the last call, after copying pages out ahead of need."""
        missing = self.sizes.ahead - len(self._free) - len(self._copied)
        while missing > 0 and (copied := self._copy_out()):
            missing -= copied
        update = ResidenceUpdate(self._moves, list(self._changed.items()), self._num_spilled > 0)
        self._moves, self._changed = [], {}
        return update

    def _settle(self, block_id: int, slot: int) -> None:
        """The block is on the device from this step on."""
        self._device[block_id] = slot
        self._changed[block_id] = slot

    def _promote(self, block_id: int) -> None:
        source = self._host[block_id]
        slot = self._take_device()
        self._moves.append(BlockMove(block_id, source, slot, True))
        self._num_spilled -= 1
        self._settle(block_id, slot)

    def _take_device(self) -> int:
        """A free device slot: one that is, or that of a page with a copy in host memory."""
        if self._free:
            return self._free.pop()
        if not self._copied:
            copied = self._copy_out()
            assert copied, "more blocks are pinned than the device has slots"
        block_id, _ = self._copied.popitem(last=False)
        slot, self._device[block_id] = self._device[block_id], ABSENT
        self._changed[block_id] = self._host[block_id]
        self._num_spilled += 1
        return slot

    def _copy_out(self) -> int:
        """Copy the next victims to host memory, as many as make one copy. Says how many."""
        count = min(self.sizes.slab, len(self._idle) + len(self._cold))
        if not count or not self._free_host.num_free:
            return 0
        slots = self._free_host.take(count)
        for host in slots:
            order = self._idle or self._cold
            block_id, _ = order.popitem(last=False)
            target = self._host[block_id] = self.sizes.first_host + host
            self._moves.append(BlockMove(block_id, self._device[block_id], target, False))
            self._copied[block_id] = None
        return len(slots)

    def _drop_host(self, block_id: int) -> None:
        self._free_host.give(self._host[block_id] - self.sizes.first_host)
        self._host[block_id] = ABSENT

    def check_pins(self, pins: Mapping[int, int]) -> None:
        wrong = [i for i, count in enumerate(self._pins) if count != pins.get(i, 0)]
        assert not wrong, f"blocks {wrong} are pinned by nobody, or not as often as asked"

    def check(self) -> None:
        """Each slot is free or has one block; a pinned block is on the device; orders are right."""
        on_device = [slot for slot in self._device if slot != ABSENT]
        assert sorted(on_device + self._free) == list(range(self.sizes.num_device)), "device slots"
        first = self.sizes.first_host
        on_host = [slot - first for slot in self._host if slot != ABSENT]
        free = self._free_host.free()
        assert len(free) == self._free_host.num_free, "the count of free host slots is wrong"
        assert sorted([*on_host, *free]) == list(range(self.sizes.num_host)), "host slots"
        assert self._num_pinned == sum(pins > 0 for pins in self._pins), "pins are miscounted"
        both = zip(self._device, self._host, strict=True)
        spilled = sum(device == ABSENT != host for device, host in both)
        assert spilled == self._num_spilled, "spilled blocks are miscounted"
        for block_id in range(self.sizes.num_blocks):
            self._check_block(block_id)

    def _check_block(self, block_id: int) -> None:
        device, host = self._device[block_id] != ABSENT, self._host[block_id] != ABSENT
        pinned = self._pins[block_id] > 0
        assert device or not pinned, f"block {block_id} is pinned, but not on the device"
        listed = (block_id in self._cold) + (block_id in self._idle)
        assert listed == (device and not host and not pinned), f"block {block_id} in no order"
        copied = block_id in self._copied
        assert copied == (device and host), f"block {block_id}: copy and order disagree"
