"""Free page slots of host memory, handed out in runs so that pages leave in large copies."""

from __future__ import annotations


class HostSlots:
    """Slots 0 … num_slots − 1 in slabs of ``slab`` neighbours; all operations take constant time.

    Whole free slabs serve whole batches. Smaller demands are met from slabs that are in use.
    """

    def __init__(self, num_slots: int, slab: int) -> None:
        assert num_slots % slab == 0, f"{num_slots} slots are no slabs of {slab}"
        self.num_slots = num_slots
        self.slab = slab
        self.num_free = num_slots
        self._whole = list(range(num_slots // slab - 1, -1, -1))  # low slabs are taken first
        self._parts: dict[int, list[int]] = {}  # slab -> its free slots, not all and not none

    def take(self, count: int) -> list[int]:
        """At most ``count`` slots, ascending and of one slab: call again for more."""
        assert self.num_free > 0 < count, f"{count} slots of {self.num_free} free ones"
        if self._whole and (count >= self.slab or not self._parts):
            slab = self._whole.pop()
            free = list(range(slab * self.slab, (slab + 1) * self.slab))
        else:
            slab, free = self._parts.popitem()
        taken, rest = free[:count], free[count:]
        if rest:
            self._parts[slab] = rest
        self.num_free -= len(taken)
        return taken

    def give(self, slot: int) -> None:
        """A slot is free again."""
        slab = slot // self.slab
        free = self._parts.setdefault(slab, [])
        free.append(slot)
        free.sort()
        self.num_free += 1
        if len(free) == self.slab:
            del self._parts[slab]
            self._whole.append(slab)

    def free(self) -> set[int]:
        """All free slots."""
        whole = (slab * self.slab + i for slab in self._whole for i in range(self.slab))
        return {*whole, *(slot for free in self._parts.values() for slot in free)}
