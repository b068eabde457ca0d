"""Pages that are kept outside of the cache, and the traffic between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from .blocks import BlockPool
from .residence import Residence


class PageAt(msgspec.Struct, frozen=True):
    """A full page by its content, and where the cache has it or is to have it."""

    digest: bytes
    block_id: int  # of its compressed entries
    slot: int  # of its keys and values


class PageShelf(Protocol):
    """Keeps pages by digest, and brings them back in its own time."""

    def __contains__(self, digest: bytes) -> bool: ...

    def fetch(self, digests: Sequence[bytes]) -> int:
        """Begin to bring pages to hand; the number that the fetch goes by."""

    def take_fetched(self) -> list[tuple[int, list[bytes]]]:
        """Fetches that have ended: number, and the leading pages that are at hand and right."""

    def discard(self, digests: Sequence[bytes]) -> None:
        """Pages at hand that a fetch brought aren't wanted."""

    def rest(self) -> None:
        """Wait a moment for a fetch to end."""

    def clear(self) -> None:
        """Forget all pages."""


class Shelving:
    """Pages that leave the cache for a shelf with the next step, and those that come from there."""

    def __init__(self, shelf: PageShelf, residence: Residence, pool: BlockPool) -> None:
        self.shelf = shelf
        self.arriving: dict[int, bytes] = {}  # block -> digest; pinned until the step is made
        self._residence = residence
        self._pool = pool
        self._departing: list[PageAt] = []

    @property
    def has_room(self) -> bool:
        """Whether the device takes one more page: half of it is left to those that run."""
        return 2 * self._residence.room > self._residence.num_places

    def depart(self, block_id: int, digest: bytes, *, keep: bool) -> None:
        """A cached block is evicted; with ``keep`` its page goes to the shelf, if it isn't there.

        A page that is about to move has no place of which the next step could read it: it goes.
        """
        if self.arriving.pop(block_id, None) is not None:
            self._residence.unpin(block_id)
            self.shelf.discard([digest])
        elif keep and digest not in self.shelf and not self._residence.is_moving(block_id):
            self._departing.append(PageAt(digest, block_id, self._residence.slot(block_id)))

    def take_departing(self) -> list[PageAt]:
        """Pages to be saved before the next step changes anything."""
        departing, self._departing = self._departing, []
        return departing

    def take_arriving(self) -> list[PageAt]:
        """Pages to be loaded once the next step has moved pages, before it computes.

        Where they are to be is settled, so: after the cache's ``take_update``.
        """
        arriving, self.arriving = self.arriving, {}
        places = []
        for block_id, digest in arriving.items():
            places.append(PageAt(digest, block_id, self._residence.slot(block_id)))
            self._residence.unpin(block_id)
            if self._pool.is_cached(block_id):
                self._residence.rest(block_id)
        return places
