"""Plain sequences put into paged caches at random places, everything else poisoned with NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_serve.kernels.shapes import CompressedKV, NSAShape, PagedKV, StepBatch


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts and dimensions of an attention layer."""

    num_q: int = 6
    num_kv: int = 2
    dim_k: int = 16
    dim_v: int = 16


@dataclass(frozen=True, slots=True)
class Tables:
    """Random blocks and slots of some requests. The first and last of each pool belong to nobody.

    So whoever follows a −1, to either end of a pool, reads poison.
    """

    block_table: Tensor  # [B, M] int32
    slot_table: Tensor  # [B, M] int32
    num_blocks: int
    num_slots: int
    nsa: NSAShape


def make_tables(lengths: Sequence[int], nsa: NSAShape, seed: int, *, spare: int = 2) -> Tables:
    """Tables for requests of these many tokens, with ``spare`` columns of −1 and spare pages."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // nsa.page) for length in lengths]
    total = sum(pages) + 2 + spare
    tables = []
    for _ in range(2):
        ids = iter((torch.randperm(total - 2, generator=generator) + 1).tolist())
        rows = [[next(ids) for _ in range(count)] for count in pages]
        width = max(pages) + spare
        table = [row + [-1] * (width - len(row)) for row in rows]
        tables.append(torch.tensor(table, dtype=torch.int32))
    return Tables(tables[0], tables[1], total, total, nsa)


def poisoned_cache(
    tables: Tables, heads: Heads, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PagedKV, CompressedKV]:
    """Pools full of NaN, strided as a layer of the block-major pool is."""

    def pool(count: int, rows: int, dim: int) -> Tensor:
        # [slot, layer, Hkv, K|V, rows, D], of which one layer and one of K and V is the view.
        shape = (count, 2, heads.num_kv, 2, rows, dim)
        return torch.full(shape, torch.nan, dtype=dtype, device=device)[:, 1, :, 1]

    page, entries = tables.nsa.page, tables.nsa.entries_per_page
    kv = PagedKV(
        pool(tables.num_slots, page, heads.dim_k), pool(tables.num_slots, page, heads.dim_v)
    )
    compressed = CompressedKV(
        pool(tables.num_blocks, entries, heads.dim_k),
        pool(tables.num_blocks, entries, heads.dim_v),
    )
    return kv, compressed


def fill_tokens(kv: PagedKV, tables: Tables, row: int, k: Tensor, v: Tensor) -> None:
    """Put a request's k [L, Hkv, Dk] and v [L, Hkv, Dv] where the slot table says."""
    page = tables.nsa.page
    for token in range(k.shape[0]):
        slot = int(tables.slot_table[row, token // page])
        kv.k[slot, :, token % page] = k[token].to(kv.k)
        kv.v[slot, :, token % page] = v[token].to(kv.v)


def fill_entries(compressed: CompressedKV, tables: Tables, row: int, k: Tensor, v: Tensor) -> None:
    """Put a request's entries k [C, Hkv, Dk] and v [C, Hkv, Dv] where the block table says."""
    for entry in range(k.shape[0]):
        page, slot = tables.nsa.entry_slot(entry)
        block = int(tables.block_table[row, page])
        compressed.k[block, :, slot] = k[entry].to(compressed.k)
        compressed.v[block, :, slot] = v[entry].to(compressed.v)


def read_entries(compressed: CompressedKV, tables: Tables, row: int, count: int) -> Tensor:
    """The first ``count`` entries of a request, keys and values side by side [C, Hkv, Dk+Dv]."""
    places = [tables.nsa.entry_slot(entry) for entry in range(count)]
    both = torch.cat([compressed.k, compressed.v], -1)
    found = [both[int(tables.block_table[row, page]), :, slot] for page, slot in places]
    return torch.stack(found) if found else both.new_zeros(0, both.shape[1], both.shape[3])


def read_tokens(kv: PagedKV, tables: Tables, row: int, count: int) -> Tensor:
    """The first ``count`` tokens of a request, keys and values side by side [L, Hkv, Dk+Dv]."""
    page, both = tables.nsa.page, torch.cat([kv.k, kv.v], -1)
    slots = tables.slot_table[row]
    return torch.stack([both[int(slots[t // page]), :, t % page] for t in range(count)])


def step_batch(
    tables: Tables,
    chunks: Sequence[tuple[int, int, int]],
    *,
    pad_tokens: int = 0,
    pad_rows: int = 0,
    device: str = "cpu",
) -> StepBatch:
    """The batch of a step that computes chunks (request, first position, number of tokens).

    Padding tokens and padding rows follow the real ones.
    """
    positions = [p for _, start, count in chunks for p in range(start, start + count)]
    rows = [row for row, (_, _, count) in enumerate(chunks) for _ in range(count)]
    borders, contexts = [0], []
    for _, start, count in chunks:
        borders.append(borders[-1] + count)
        contexts.append(start + count)
    width = tables.block_table.shape[1]
    nobody = torch.full((pad_rows, width), -1, dtype=torch.int32)
    requests = [request for request, _, _ in chunks]

    def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return StepBatch(
        positions=ints(positions + [-1] * pad_tokens, torch.int64),
        token_rows=ints(rows + [0] * pad_tokens),
        cu_seqlens_q=ints(borders + borders[-1:] * pad_rows),
        context_lens=ints(contexts + [0] * pad_rows),
        block_table=torch.cat([tables.block_table[requests], nobody]).to(device),
        slot_table=torch.cat([tables.slot_table[requests], nobody]).to(device),
        max_query_len=max(count for _, _, count in chunks),
        max_context_len=max(contexts),
    )


def chunks_of(total: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, count) of chunks that cover ``total`` tokens; the last size repeats."""
    chunks, start, index = [], 0, 0
    while start < total:
        count = min(sizes[min(index, len(sizes) - 1)], total - start)
        chunks.append((start, count))
        start, index = start + count, index + 1
    return chunks
