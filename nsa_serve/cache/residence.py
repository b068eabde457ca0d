"""Where raw K/V of a block lives: block id to slot, apart from who owns the block."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

ABSENT = -1


class BlockMove(msgspec.Struct, frozen=True):
    """A page's raw K/V is copied between two slots before the step runs."""

    block_id: int
    source_slot: int
    target_slot: int
    to_device: bool


class ResidenceUpdate(msgspec.Struct, frozen=True):
    """What a step does to the places of pages: copies in this order, then the changed slots."""

    moves: list[BlockMove]
    slots: list[tuple[int, int]]  # (block id, the slot where it is read from this step on)
    spilled: bool  # some block that holds something is in host memory alone


class Residence:
    """Device slot of each block that holds something, where there is no host tier.

    Every block then has a slot of its own, and block i gets slot i: pages never move. Readers
    still ask here, since an id and a place are two things.
    """

    def __init__(self, num_blocks: int) -> None:
        self._slots = [ABSENT] * num_blocks

    @property
    def num_places(self) -> int:
        """Blocks that may be pinned in all."""
        return len(self._slots)

    @property
    def room(self) -> int:
        """Blocks that may be pinned beside those that are: here pinning costs nothing."""
        return len(self._slots)

    @property
    def num_spilled(self) -> int:
        """Blocks that are not on the device."""
        return 0

    def place(self, block_id: int) -> None:
        """Give a block its slot before it is written for the first time; it is pinned once."""
        assert self._slots[block_id] == ABSENT, f"block {block_id} has a slot already"
        self._slots[block_id] = block_id

    def vacate(self, block_id: int) -> None:
        """The block holds nothing any more."""
        assert self._slots[block_id] != ABSENT, f"block {block_id} has no slot"
        self._slots[block_id] = ABSENT

    def slot(self, block_id: int) -> int:
        """Where the block is read, or ``ABSENT``."""
        return self._slots[block_id]

    def is_pinned(self, block_id: int) -> bool:
        """Whether pinning the block once more needs no room."""
        return True

    def pin(self, block_id: int) -> None:
        """The block is on the device until it is unpinned as often."""

    def unpin(self, block_id: int) -> None:
        """One reason less for the block to be on the device."""

    def rest(self, block_id: int) -> None:
        """Nobody holds the block now; it is kept for its content."""

    def rests(self, block_id: int) -> bool:
        """Whether the block goes before those that somebody holds when places run short."""
        return False

    def wake(self, block_id: int) -> None:
        """Somebody holds the block again."""

    def is_moving(self, block_id: int) -> bool:
        """Whether the next update copies the block: until then its page is elsewhere."""
        return False

    def take_update(self) -> ResidenceUpdate | None:
        """What changed since the last call; None where places never change."""
        return None

    def check_pins(self, pins: Mapping[int, int]) -> None:
        """Each block is pinned as often as ``pins`` says."""

    def spilled(self) -> list[int]:
        """Blocks whose raw pages are in host memory alone; here there is no host tier."""
        return []

    def check(self) -> None:
        """No slot is given twice."""
        taken = [slot for slot in self._slots if slot != ABSENT]
        assert len(set(taken)) == len(taken), "two blocks share a slot"
