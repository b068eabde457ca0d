"""Free blocks and reference counts: who may write a page of the cache, and who keeps it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

# In ``holders``: nobody holds the block, and it is kept for its content.
KEPT = 255


class BlockPool:
    """Every block id is free, cached (kept for its content, held by nobody) or in use.

    All operations take constant time. Cached blocks stand in the order in which they were
    released; the first is the least recently used.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool needs a block, got {num_blocks}"
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # low ids are taken first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def holders(self) -> bytes:
        """A byte for each block: how many hold it, at most 254; ``KEPT`` where it is cached."""
        counts = bytearray(min(count, KEPT - 1) for count in self._ref_counts)
        for block_id in self._cached:
            counts[block_id] = KEPT
        return bytes(counts)

    def is_cached(self, block_id: int) -> bool:
        return block_id in self._cached

    def take(self) -> int:
        """A free block, now held once. There must be one: evict first."""
        block_id = self._free.pop()
        self._ref_counts[block_id] = 1
        return block_id

    def hold(self, block_id: int) -> None:
        """One more holder of a cached block or of one in use."""
        if self._ref_counts[block_id] == 0:
            del self._cached[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, keep: bool) -> bool:
        """One holder less; with ``keep`` the last one leaves it cached. Says if it became free."""
        count = self._ref_counts[block_id] - 1
        assert count >= 0, f"block {block_id} is released but nobody holds it"
        self._ref_counts[block_id] = count
        if count:
            return False
        if keep:
            self._cached[block_id] = None
            return False
        self._free.append(block_id)
        return True

    def evict(self) -> int:
        """The least recently used cached block becomes free; its content is lost."""
        block_id, _ = self._cached.popitem(last=False)
        self._free.append(block_id)
        return block_id

    def discard(self, block_id: int) -> None:
        """A cached block becomes free out of its turn."""
        del self._cached[block_id]
        self._free.append(block_id)

    def check(self) -> None:
        """Each block is in exactly one of the three states."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        both = free & self._cached.keys()
        assert not both, f"blocks {sorted(both)} are free and cached"
        idle = {i for i, count in enumerate(self._ref_counts) if count == 0}
        parked = free | self._cached.keys()
        assert idle == parked, f"blocks {sorted(idle ^ parked)}: count and state disagree"


@dataclass(slots=True)
class BlockTable:
    """One request's blocks by page, and the digests of its full pages."""

    cache_salt: str
    block_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # kept over preemptions
    num_published: int = 0  # leading pages that were hit, or filed when they were confirmed
    first_near: int | None = None  # with a host tier: pinned are forced pages and those from here
    publishes: bool = True  # False: its content was made from pages that are no longer trusted
