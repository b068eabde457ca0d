"""The ragged batch and the paged cache as attention reads them: query tiles and page gathers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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


def short_tokens(batch: StepBatch) -> Tensor | None:
    """Indices [t] of the tokens to attend one by one; None stands for all of them."""
    if batch.max_query_len <= _SHORT_ROW:
        return None
    short = batch.cu_seqlens_q.diff() <= _SHORT_ROW
    return (short[batch.token_rows.long()] & (batch.positions >= 0)).nonzero()[:, 0]


def long_rows(batch: StepBatch) -> Iterator[QueryTile]:
    """The rows that are too long for attention token by token, each as one tile."""
    if batch.max_query_len <= _SHORT_ROW:
        return
    for row, (start, stop) in enumerate(pairwise(batch.cu_seqlens_q.tolist())):
        tokens = int((batch.positions[start:stop] >= 0).sum())
        if stop - start > _SHORT_ROW and tokens > 0:
            yield QueryTile(row, start, start + tokens, int(batch.positions[start]))


def gather_pages(cache: Tensor, slots: Tensor) -> Tensor:
    """Pages ``slots`` [..., Hkv or 1, m] of a pool [S, Hkv, E, D]: [..., Hkv, m·E, D].

    Each KV head may have its own pages. What stands for a slot of −1 is some other page's bytes:
    the caller masks them.
    """
    slots, rows = _places(slots, cache.shape, cache.stride())
    return _gather(cache, slots, rows)


def gather_both(cache: PagedKV | CompressedKV, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the same pages, as of ``gather_pages``."""
    return gather_pages(cache.k, slots), gather_pages(cache.v, slots)


# The layers' pools are laid out alike, and much of what they read is found once for all of them.
@lru_cache(maxsize=64)
def _places(
    slots: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """``slots`` as indices, and where their pieces [..., Hkv, m] lie.

    That is None unless the pool is a table of pieces of one head and page.
    """
    slots = slots.clamp(min=0).long()
    _, heads, rows, dim = shape
    by_slot, by_head, by_row, by_element = stride
    piece = rows * dim
    if by_element != 1 or by_row != dim or by_slot % piece or by_head % piece:
        return slots, None
    step = max(1, by_head // piece)
    of_head = torch.arange(0, heads * step, step, device=slots.device)[:, None]
    return slots, slots * (by_slot // piece) + of_head


def _gather(cache: Tensor, slots: Tensor, piece_rows: Tensor | None) -> Tensor:
    """Pages [..., Hkv, m·E, D] of a pool [S, Hkv, E, D]."""
    count, heads, rows, dim = cache.shape
    if piece_rows is None:
        head = torch.arange(heads, device=cache.device)[:, None]
        return cache[slots, head].flatten(-3, -2)
    # Copied in runs, several times as fast as element by element.
    piece = rows * dim
    last = ((count - 1) * cache.stride(0) + (heads - 1) * cache.stride(1)) // piece
    table = cache.as_strided((last + 1, piece), (piece, 1), cache.storage_offset())
    pages = table.index_select(0, piece_rows.flatten())
    return pages.view(*piece_rows.shape[:-1], piece_rows.shape[-1] * rows, dim)
