"""Pages that stay on the device of a cache with a host tier: forced ones, and those of the window.

Only the op that selects pages asks where they are; all others read a request's near pages as they
find them, so those are pinned while the request runs.
"""

from __future__ import annotations

from typing import NamedTuple

from .blocks import BlockTable
from .residence import Residence


class NearPages(NamedTuple):
    """Which pages of a running request stay on the device: forced ones and those of its window."""

    num_initial: int
    num_tokens: int  # before the next one to compute that its ops read without asking where


class NearPins:
    """Pins a request's near pages as it goes on. What is pinned follows from its table."""

    def __init__(self, near: NearPages, residence: Residence, page_size: int) -> None:
        self._near = near
        self._residence = residence
        self._page_size = page_size

    def fit(self, num_requests: int, num_tokens: int) -> bool:
        """Whether the device holds what so many requests and a step's tokens pin at most."""
        each = self._near.num_initial + self._num_pages(self._near.num_tokens) + 1
        return num_requests * each + self._num_pages(num_tokens) <= self._residence.num_places

    def slide(self, table: BlockTable, num_computed: int, num_new: int) -> bool:
        """Pin what the next tokens read directly, unpin what fell behind; no more than has room.

        False, and nothing more pinned, unless ``num_new`` pages fit on the device beside it.
        """
        first = max(0, num_computed - self._near.num_tokens) // self._page_size
        if table.first_near is None:
            return self._begin(table, first, num_new)
        for page in range(max(table.first_near, self._near.num_initial), first):
            self._residence.unpin(table.block_ids[page])
        table.first_near = max(first, table.first_near)
        return num_new <= self._residence.room

    def end(self, table: BlockTable) -> None:
        """The request runs no more: nothing of it is pinned."""
        for block_id in self.pinned(table):
            self._residence.unpin(block_id)
        table.first_near = None

    def pinned(self, table: BlockTable) -> list[int]:
        """Blocks of a request that are pinned now."""
        return [] if table.first_near is None else self._blocks(table, table.first_near)

    def _begin(self, table: BlockTable, first: int, num_new: int) -> bool:
        """Pin the near pages of a request that starts, if they fit."""
        near = self._blocks(table, first)
        loose = sum(not self._residence.is_pinned(block_id) for block_id in near)
        if loose + num_new > self._residence.room:
            return False
        for block_id in near:
            self._residence.pin(block_id)
        table.first_near = first
        return True

    def _blocks(self, table: BlockTable, first: int) -> list[int]:
        """Forced blocks, and all from page ``first`` on."""
        held = len(table.block_ids)
        pages = (*range(min(self._near.num_initial, first, held)), *range(first, held))
        return [table.block_ids[page] for page in pages]

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
