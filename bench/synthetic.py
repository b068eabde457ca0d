"""Random caches, batches and selections of a stated shape, for timing ops and steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.shapes import CompressedKV, NSAShape, PagedKV, StepBatch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one layer. The default is the paper's group of 16 with equal head dimensions."""

    num_q_heads: int = 64
    num_kv_heads: int = 4
    head_dim_k: int = 128
    head_dim_v: int = 128

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's inputs: equal requests, of which the last tokens are queried."""

    shape: AttentionShape
    nsa: NSAShape
    q: Tensor  # [T, Hq, Dk]
    k: Tensor  # [T, Hkv, Dk], of this step
    v: Tensor  # [T, Hkv, Dv]
    gate_logits: Tensor  # [T, Hq, 3]
    kv: PagedKV
    compressed: CompressedKV
    batch: StepBatch


def make_case(
    shape: AttentionShape,
    nsa: NSAShape,
    *,
    num_rows: int,
    context_len: int,
    query_len: int,
    device: str,
    dtype: torch.dtype,
    max_context_len: int | None = None,
) -> Case:
    """Random normal K/V in pages scattered over the pool; every row queries its last tokens."""
    pages = -(-context_len // nsa.page)
    num_blocks = num_rows * pages
    table = torch.randperm(num_blocks, device=device).to(torch.int32).view(num_rows, pages)
    T = num_rows * query_len
    positions = torch.arange(context_len - query_len, context_len, device=device)
    heads = (shape.num_kv_heads,)
    page, entries = nsa.page, nsa.entries_per_page

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    return Case(
        shape=shape,
        nsa=nsa,
        q=normal(T, shape.num_q_heads, shape.head_dim_k),
        k=normal(T, *heads, shape.head_dim_k),
        v=normal(T, *heads, shape.head_dim_v),
        gate_logits=normal(T, shape.num_q_heads, 3),
        kv=PagedKV(
            normal(num_blocks, *heads, page, shape.head_dim_k),
            normal(num_blocks, *heads, page, shape.head_dim_v),
        ),
        compressed=CompressedKV(
            normal(num_blocks, *heads, entries, shape.head_dim_k),
            normal(num_blocks, *heads, entries, shape.head_dim_v),
        ),
        batch=StepBatch(
            positions=positions.repeat(num_rows),
            token_rows=torch.arange(num_rows, device=device, dtype=torch.int32)
            .repeat_interleave(query_len),
            cu_seqlens_q=torch.arange(num_rows + 1, device=device, dtype=torch.int32) * query_len,
            context_lens=torch.full((num_rows,), context_len, device=device, dtype=torch.int32),
            block_table=table,
            slot_table=table,
            max_query_len=query_len,
            max_context_len=max_context_len or context_len,
        ),
    )  # fmt: skip


def local_selection(positions: Tensor, num_kv_heads: int, nsa: NSAShape, keep: float) -> Tensor:
    """A selection [T, Hkv, n] in which a token keeps ``keep`` of its neighbour's free choices.

    Free choice i of a token is a uniform draw over its candidate blocks, redrawn with probability
    1 − keep from one token to the next; ``keep`` 0 is random selection, the worst case. A repeated
    draw is replaced by the nearest lower block that is free, as lists hold a block once.
    """
    forced = nsa.num_initial + nsa.num_local
    free, T, device = nsa.num_selected - forced, positions.shape[0], positions.device
    fresh = torch.rand(T, num_kv_heads, free, device=device) >= keep
    fresh[0] = True
    index = torch.arange(T, device=device)[:, None, None]
    origin = torch.where(fresh, index, -1).cummax(dim=0).values
    draws = torch.rand(T, num_kv_heads, free, device=device, dtype=torch.float64)
    draws = draws.gather(0, origin)
    current = positions[:, None, None] // nsa.page
    first, last = nsa.num_initial, positions // nsa.page - nsa.num_local
    # Drawn against the last candidate of the block of tokens where the draw was made, so that a
    # kept choice stays the same block.
    room = (last[origin.view(T, -1)].view_as(origin) - first + 1).clamp_min(1)
    chosen = (first + (draws * room).long()).sort(dim=-1).values
    chosen = _distinct(chosen, first)
    initial = torch.arange(nsa.num_initial, device=device).expand(T, num_kv_heads, -1)
    local = (current - nsa.num_local + 1) + torch.arange(nsa.num_local, device=device)
    lists = torch.cat([initial, chosen, local.expand(T, num_kv_heads, -1)], dim=-1)
    everything = torch.arange(nsa.num_selected, device=device).expand_as(lists)
    everything = torch.where(everything <= current, everything, -1)
    dense = (positions < nsa.dense_len)[:, None, None]
    return torch.where(dense, everything, lists).to(torch.int32)


def _distinct(chosen: Tensor, first: int) -> Tensor:
    """Sorted choices made strictly ascending: repeats lowered, then lifted at the floor."""
    for i in range(chosen.shape[-1] - 2, -1, -1):
        chosen[..., i] = torch.minimum(chosen[..., i], chosen[..., i + 1] - 1)
    floor = first + torch.arange(chosen.shape[-1], device=chosen.device)
    return torch.maximum(chosen, floor)
