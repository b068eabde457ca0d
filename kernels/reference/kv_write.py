"""Writing a step's keys, values and completed compressed entries into the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..contracts import check
from ..shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch
from .compress import compress
from .paged import geometry

Tensor = torch.Tensor


def kv_write(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    compressed: CompressedKV | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    compressor: Compressor,
) -> None:
    """Write K/V of every token, and every compressed entry that these tokens complete.

    ``k`` [T, Hkv, Dk] and ``v`` [T, Hkv, Dv] are rounded to the cache's type into slot
    ``slot_table[row, pos // P]``. Entry i is completed by token i·d + l − 1 and goes to block
    ``block_table[row, page of that token]``. φ reads rounded tokens only, this step's and the
    cache's alike, so its bytes don't depend on the chunking. ``compressed`` None: a dense model.
    """
    check(k.shape[:2] == v.shape[:2], "k and v differ in tokens or heads", k=k, v=v)
    check(k.shape[0] == batch.num_tokens, "k has another number of tokens than the batch", k=k)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", k=kv.k, P=nsa.page)
    where = batch.once(("token places", nsa.page), lambda: _token_places(batch, nsa.page))
    if where.real is not None:
        k, v = k[where.real], v[where.real]
    key = ("token rows", where, geometry(kv))
    k_rows, v_rows = batch.once(key, lambda: (_rows(kv.k, where), _rows(kv.v, where)))
    _write_tokens(kv.k, k, where, k_rows)
    _write_tokens(kv.v, v, where, v_rows)
    if compressed is None:
        return
    entries = batch.once(("entry places", nsa), lambda: _entry_places(batch, nsa))
    if entries is not None:
        _write_entries(kv, compressed, entries, compressor)


@dataclass(frozen=True, slots=True, eq=False)
class _TokenPlaces:
    """Where a step's tokens go: [t] slots and offsets in them."""

    slots: Tensor
    offsets: Tensor
    real: Tensor | None  # [T] bool, which tokens those are; None: all


@dataclass(frozen=True, slots=True)
class _EntryPlaces:
    """The E entries that a step completes: their tokens, and where they go."""

    first_positions: Tensor  # [E]
    token_slots: Tensor  # [E, l]
    token_offsets: Tensor  # [E, l]
    blocks: Tensor  # [E]
    within: Tensor  # [E], the entry's place in its block


def _token_places(batch: StepBatch, page: int) -> _TokenPlaces:
    positions, rows, real = batch.positions, batch.token_rows.long(), batch.positions >= 0
    whole = bool(real.all())
    if not whole:
        positions, rows = positions[real], rows[real]
    slots = batch.slot_table[rows, positions // page].long()
    return _TokenPlaces(slots, positions % page, None if whole else real)


def _entry_places(batch: StepBatch, nsa: NSAShape) -> _EntryPlaces | None:
    first = batch.positions + 1 - nsa.compress_len
    completes = (first >= 0) & (first % nsa.compress_stride == 0)
    which = completes.nonzero()[:, 0]
    if which.numel() == 0:
        return None
    first, rows = first[which], batch.token_rows.long()[which]
    tokens = first[:, None] + torch.arange(nsa.compress_len, device=first.device)  # [E, l]
    pages = tokens // nsa.page
    page = pages[:, -1]
    return _EntryPlaces(
        first_positions=first,
        token_slots=batch.slot_table[rows[:, None], pages].long(),
        token_offsets=tokens % nsa.page,
        blocks=batch.block_table[rows, page].long(),
        within=first // nsa.compress_stride + nsa.overlap - 1 - page * nsa.entries_per_page,
    )


def _write_tokens(pool: Tensor, x: Tensor, where: _TokenPlaces, rows: Tensor | None) -> None:
    """``x`` [t, Hkv, D] into its places in a pool [S, Hkv, P, D]."""
    x = x.to(pool.dtype)
    if rows is None:
        pool[where.slots, :, where.offsets] = x
        return
    dim = pool.shape[3]
    span = sum((n - 1) * step for n, step in zip(pool.shape, pool.stride(), strict=True)) + 1
    table = pool.as_strided((span // dim, dim), (dim, 1), pool.storage_offset())
    table.index_copy_(0, rows, x.reshape(-1, dim))


def _rows(pool: Tensor, where: _TokenPlaces) -> Tensor | None:
    """Rows of tokens and heads [t·Hkv] in the pool as a table of rows; None if it is no table."""
    _, heads, _, dim = pool.shape
    by_slot, by_head, by_row, by_element = pool.stride()
    if by_element != 1 or by_slot % dim or by_head % dim or by_row % dim:
        return None
    first = where.slots * (by_slot // dim) + where.offsets * (by_row // dim)
    of_head = torch.arange(heads, device=pool.device) * (by_head // dim)
    return (first[:, None] + of_head).flatten()


def _write_entries(
    kv: PagedKV, compressed: CompressedKV, entries: _EntryPlaces, compressor: Compressor
) -> None:
    slots, offsets = entries.token_slots, entries.token_offsets
    entry_k, entry_v = compress(
        kv.k[slots, :, offsets].transpose(1, 2),
        kv.v[slots, :, offsets].transpose(1, 2),
        first_positions=entries.first_positions,
        compressor=compressor,
    )
    compressed.k[entries.blocks, :, entries.within] = entry_k.to(compressed.k.dtype)
    compressed.v[entries.blocks, :, entries.within] = entry_v.to(compressed.v.dtype)
