"""Random decode and mixed steps over a poisoned paged cache, for the tests of the GPU ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa_serve.kernels import reference
from nsa_serve.kernels.shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch

SMALL = NSAShape(
    compress_len=8,
    compress_stride=4,
    page=16,
    num_selected=4,
    num_initial=1,
    num_local=2,
    window=24,
)


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose older tokens are already in the cache; ``k`` and ``v`` are its own tokens'."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv: PagedKV
    compressed: CompressedKV
    batch: StepBatch


def _tables(contexts: list[int], page: int, gen: torch.Generator) -> tuple[torch.Tensor, int]:
    counts = [-(-context // page) for context in contexts]
    ids = torch.randperm(sum(counts) + 3, generator=gen).to(torch.int32)
    table = torch.full((len(contexts), max(1, *counts)), -1, dtype=torch.int32)
    start = 0
    for row, count in enumerate(counts):
        table[row, :count] = ids[start : start + count]
        start += count
    return table, sum(counts) + 3


def make_batch(
    contexts: list[int],
    queries: list[int],
    nsa: NSAShape,
    *,
    padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
    max_context_len: int | None = None,
) -> tuple[StepBatch, int, int]:
    """(batch, block ids, slots) of rows with ``contexts`` tokens of which ``queries`` are new."""
    gen = torch.Generator().manual_seed(seed)
    blocks, num_blocks = _tables(contexts, nsa.page, gen)
    slots, num_slots = _tables(contexts, nsa.page, gen)
    positions = [torch.arange(c - n, c) for c, n in zip(contexts, queries, strict=True)] + [
        torch.full((padding,), -1)
    ]
    rows = [torch.full((n,), row) for row, n in enumerate(queries)] + [torch.zeros(padding)]
    starts = torch.tensor([0, *queries]).cumsum(0)
    batch = StepBatch(
        positions=torch.cat(positions).long().to(device),
        token_rows=torch.cat(rows).int().to(device),
        cu_seqlens_q=starts.int().to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table=blocks.to(device),
        slot_table=slots.to(device),
        max_query_len=max(queries),
        max_context_len=max_context_len or max(contexts),
    )
    return batch, num_blocks, num_slots


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _history(batch: StepBatch, contexts: list[int]) -> StepBatch:
    """The batch that writes all tokens of all rows at once."""
    positions = torch.cat([torch.arange(c) for c in contexts])
    rows = torch.cat([torch.full((c,), row) for row, c in enumerate(contexts)])
    device = batch.positions.device
    return StepBatch(
        positions=positions.to(device),
        token_rows=rows.int().to(device),
        cu_seqlens_q=torch.tensor([0, *contexts]).cumsum(0).int().to(device),
        context_lens=batch.context_lens,
        block_table=batch.block_table,
        slot_table=batch.slot_table,
        max_query_len=max(contexts),
        max_context_len=max(contexts),
    )


def make_step(
    contexts: list[int],
    queries: list[int],
    nsa: NSAShape = SMALL,
    *,
    hq: int = 4,
    hkv: int = 2,
    dk: int = 16,
    dv: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
    compressor: Compressor | None = None,
    max_context_len: int | None = None,
) -> Step:
    """A step with every token of every row in the cache, and NaN wherever nothing was written."""
    batch, num_blocks, num_slots = make_batch(
        contexts,
        queries,
        nsa,
        padding=padding,
        seed=seed,
        device=device,
        max_context_len=max_context_len,
    )
    gen = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).to(dtype).to(device)

    per_page = nsa.entries_per_page
    kv = PagedKV(
        _poisoned((num_slots, hkv, nsa.page, dk), dtype, device),
        _poisoned((num_slots, hkv, nsa.page, dv), dtype, device),
    )
    compressed = CompressedKV(
        _poisoned((num_blocks, hkv, per_page, dk), dtype, device),
        _poisoned((num_blocks, hkv, per_page, dv), dtype, device),
    )
    total = sum(contexts)
    k, v = normal(total, hkv, dk), normal(total, hkv, dv)
    reference.kv_write(
        k,
        v,
        kv,
        compressed,
        _history(batch, contexts),
        nsa=nsa,
        compressor=compressor or Compressor(),
    )
    ends = torch.tensor([0, *contexts]).cumsum(0).tolist()
    new = [torch.arange(ends[r + 1] - n, ends[r + 1]) for r, n in enumerate(queries)]
    index = torch.cat([*new, torch.zeros(padding, dtype=torch.long)]).to(device)
    q = normal(batch.num_tokens, hq, dk)
    return Step(q, k[index], v[index], kv, compressed, batch)
