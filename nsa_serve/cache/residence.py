"""Where raw K/V of a block lives: block id to device slot, apart from who owns the block."""

from __future__ import annotations

from collections.abc import Iterable

ABSENT = -1


class Residence:
    """Device slot of each block that holds something.

    Without a host tier every block has a slot of its own, and block i gets slot i: pages never
    move. Readers still ask here, since an id and a place are two things.
    """

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        assert num_slots >= num_blocks, (
            f"{num_blocks} blocks need as many device slots without a host tier, not {num_slots}"
        )
        self._slots = [ABSENT] * num_blocks

    def place(self, block_id: int) -> int:
        """Give a block its slot before it is written for the first time."""
        assert self._slots[block_id] == ABSENT, f"block {block_id} has a slot already"
        self._slots[block_id] = block_id
        return block_id

    def vacate(self, block_id: int) -> None:
        assert self._slots[block_id] != ABSENT, f"block {block_id} has no slot"
        self._slots[block_id] = ABSENT

    def slot(self, block_id: int) -> int:
        """The block's device slot, or ``ABSENT``."""
        return self._slots[block_id]

    def slots(self, block_ids: Iterable[int]) -> list[int]:
        return [self._slots[block_id] for block_id in block_ids]

    def check(self) -> None:
        """No slot is given twice."""
        taken = [slot for slot in self._slots if slot != ABSENT]
        assert len(set(taken)) == len(taken), "two blocks share a device slot"
