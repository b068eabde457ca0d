"""The ragged batch and the paged cache as attention reads them: query tiles and page gathers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..contracts import check
from ..shapes import CompressedKV, PagedKV, StepBatch

Tensor = torch.Tensor

# Rows of up to this many tokens are attended token by token, longer ones in query tiles.
_SHORT_ROW = 8


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Neighbouring tokens start … stop − 1 of one row, from position ``first`` on."""

    row: int
    start: int
    stop: int
    first: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def last(self) -> int:
        """Position of the last token."""
        return self.first + self.size - 1

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    def split(self, size: int) -> Iterator[QueryTile]:
        """Parts of at most ``size`` tokens whose borders are positions divisible by ``size``."""
        start, first = self.start, self.first
        while start < self.stop:
            stop = min(self.stop, start + size - first % size)
            yield QueryTile(self.row, start, stop, first)
            start, first = stop, first + stop - start


def check_queries(q: Tensor, cache: PagedKV | CompressedKV, batch: StepBatch) -> None:
    """Raise ``ContractError`` unless ``q`` [T, Hq, Dk] fits the cache and the batch."""
    check(q.ndim == 3, "q is not [T, Hq, Dk]", q=q)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(q.shape[2] == cache.k.shape[3], "q and the cached keys differ in width", q=q, k=cache.k)
    check(q.shape[1] % cache.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=cache.k)
    check(q.device == cache.k.device, "q and the cache are on two devices", q=q, k=cache.k)


def _is_short(batch: StepBatch) -> bool:
    # A tile's sums depend on where it starts and ends, a lone token's on its context alone.
    return batch.uniform or batch.max_query_len <= _SHORT_ROW


def short_tokens(batch: StepBatch) -> Tensor | None:
    """Indices [t] of the tokens to attend one by one; None stands for all of them."""
    if _is_short(batch):
        return None
    return batch.once("short tokens", lambda: _find_short_tokens(batch))


def _find_short_tokens(batch: StepBatch) -> Tensor:
    short = batch.cu_seqlens_q.diff() <= _SHORT_ROW
    return (short[batch.token_rows.long()] & (batch.positions >= 0)).nonzero()[:, 0]


def long_rows(batch: StepBatch) -> Sequence[QueryTile]:
    """The rows that are too long for attention token by token, each as one tile."""
    if _is_short(batch):
        return ()
    return batch.once("long rows", lambda: tuple(_find_long_rows(batch)))


def _find_long_rows(batch: StepBatch) -> Iterator[QueryTile]:
    for row, (start, stop) in enumerate(pairwise(batch.cu_seqlens_q.tolist())):
        tokens = int((batch.positions[start:stop] >= 0).sum())
        if stop - start > _SHORT_ROW and tokens > 0:
            yield QueryTile(row, start, start + tokens, int(batch.positions[start]))


@dataclass(frozen=True, slots=True)
class PagePlaces:
    """Where pages lie in a pool and in every other of its shape and strides.

    ``pieces`` counts in pieces of one head and page; None where the pool is no table of them.
    """

    slots: Tensor  # [..., Hkv or 1, m] int64
    pieces: Tensor | None  # [..., Hkv, m] int64


def find_places(slots: Tensor, pool: Tensor) -> PagePlaces:
    """Places of ``slots`` [..., Hkv or 1, m] in a pool [S, Hkv, E, D]; −1 stands for some page."""
    slots = slots.clamp(min=0).long()
    _, heads, rows, dim = pool.shape
    by_slot, by_head, by_row, by_element = pool.stride()
    piece = rows * dim
    if by_element != 1 or by_row != dim or by_slot % piece or by_head % piece:
        return PagePlaces(slots, None)
    step = max(1, by_head // piece)
    of_head = torch.arange(0, heads * step, step, device=slots.device)[:, None]
    return PagePlaces(slots, slots * (by_slot // piece) + of_head)


def geometry(cache: PagedKV | CompressedKV) -> tuple[tuple[int, ...], ...]:
    """What places in a cache depend on; the layers of a model have the same."""
    return (cache.k.shape, cache.k.stride(), cache.v.shape, cache.v.stride())


def places_of_both(slots: Tensor, cache: PagedKV | CompressedKV) -> tuple[PagePlaces, PagePlaces]:
    """Places of ``slots`` among keys and among values."""
    keys = find_places(slots, cache.k)
    alike = cache.k.shape == cache.v.shape and cache.k.stride() == cache.v.stride()
    return keys, keys if alike else find_places(slots, cache.v)


def gather_pages(pool: Tensor, slots: Tensor) -> Tensor:
    """Pages ``slots`` [..., Hkv or 1, m] of a pool [S, Hkv, E, D]: [..., Hkv, m·E, D].

    Each KV head may have its own pages. What stands for a slot of −1 is some other page's bytes:
    the caller masks them.
    """
    return gather_places(pool, find_places(slots, pool))


def gather_both(cache: PagedKV | CompressedKV, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the same pages, as of ``gather_pages``."""
    keys, values = places_of_both(slots, cache)
    return gather_places(cache.k, keys), gather_places(cache.v, values)


def gather_places(pool: Tensor, places: PagePlaces) -> Tensor:
    """Pages [..., Hkv, m·E, D] of a pool [S, Hkv, E, D]."""
    count, heads, rows, dim = pool.shape
    pieces = places.pieces
    if pieces is None:
        head = torch.arange(heads, device=pool.device)[:, None]
        return pool[places.slots, head].flatten(-3, -2)
    # Copied in runs, several times as fast as element by element.
    piece = rows * dim
    last = ((count - 1) * pool.stride(0) + (heads - 1) * pool.stride(1)) // piece
    table = pool.as_strided((last + 1, piece), (piece, 1), pool.storage_offset())
    pages = table.index_select(0, pieces.flatten())
    return pages.view(*pieces.shape[:-1], pieces.shape[-1] * rows, dim)
