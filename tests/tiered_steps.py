"""Steps whose older pages lie in host memory, and hot blocks of one layer for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from nsa_serve.kernels.shapes import NEVER, UNCLAIMED, HotBlocks, NSAShape, PagedKV, StepBatch

from .gpu_steps import SMALL, Step, make_step

BOOKS = ("owners", "places", "last_used", "early", "counts", "claims")


def make_hot(
    kv: PagedKV, num_blocks: int, num_hot: int, *, step: int = 1, device: str = "cpu"
) -> HotBlocks:
    """Empty hot blocks behind the pages of ``kv``, which must have ``num_hot`` slots for them."""
    heads = kv.k.shape[1]

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return HotBlocks(
        first_slot=kv.k.shape[0] - num_hot,
        owners=full(-1, heads, num_hot),
        places=full(-1, heads, num_blocks),
        last_used=full(NEVER, heads, num_hot),
        early=full(0, heads, num_hot),
        order=torch.arange(num_hot, dtype=torch.int32, device=device).expand(heads, -1).clone(),
        clock=full(step, 1),
        claims=full(UNCLAIMED, heads, num_blocks),
        victims=full(-1, heads, num_hot),
        fetched=full(-1, heads, num_hot),
        num_fetched=full(-1, heads),
        counts=full(0, 5, dtype=torch.int64),
    )


def next_step(hot: HotBlocks) -> None:
    """What the runner does between two steps."""
    hot.clock.add_(1)
    hot.order.copy_(hot.last_used.argsort(dim=1, stable=True))


def poisoned_like(pages: torch.Tensor, count: int) -> torch.Tensor:
    return torch.full((count, *pages.shape[1:]), torch.nan, dtype=pages.dtype, device=pages.device)


def spill(step: Step, away: torch.Tensor, num_hot: int) -> Step:
    """``step`` with the pages ``away`` [B, M] in host memory, and room for hot blocks.

    Their device slots hold NaN then, as do the hot ones. The device's and the host's pages lie in
    storages of their own.
    """
    batch, kv = step.batch, step.kv
    pages = batch.slot_table[away].long()
    host = PagedKV(kv.k[pages], kv.v[pages])
    device = [torch.cat([x, poisoned_like(x, num_hot)]) for x in (kv.k, kv.v)]
    for x in device:
        x[pages] = torch.nan
    slots = batch.slot_table.clone()
    first_host = device[0].shape[0]
    slots[away] = first_host + torch.arange(len(pages), dtype=torch.int32, device=slots.device)
    tiered = PagedKV(*device, host=host)
    return replace(step, kv=tiered, batch=replace(batch, slot_table=slots))


def far_pages(batch: StepBatch, nsa: NSAShape, seed: int, share: float = 0.7) -> torch.Tensor:
    """Some pages [B, M] that no token of the step reads but by its selection."""
    gen = torch.Generator().manual_seed(seed)
    table = batch.slot_table.cpu()
    lengths = batch.cu_seqlens_q.cpu().diff()
    first = (batch.context_lens.cpu() - lengths - nsa.window).clamp(min=0) // nsa.page
    page = torch.arange(table.shape[1])
    far = (page < first[:, None]) & (table >= 0)
    away = far & (torch.rand(table.shape, generator=gen) < share)
    return away.to(batch.slot_table.device)


def any_selection(batch: StepBatch, heads: int, nsa: NSAShape, seed: int) -> torch.Tensor:
    """A selection [T, Hkv, n] int32 as the op gives it, drawn at random; forced blocks are in."""
    gen = torch.Generator().manual_seed(seed)
    chosen = torch.full((batch.num_tokens, heads, nsa.num_selected), -1, dtype=torch.int32)
    for token, position in enumerate(batch.positions.tolist()):
        blocks = position // nsa.page + 1 if position >= 0 else 0
        for head in range(heads):
            scores = torch.rand(blocks, generator=gen)
            scores[: nsa.num_initial] = 2
            scores[max(0, blocks - nsa.num_local) :] = 2
            taken = scores.topk(min(blocks, nsa.num_selected)).indices.sort().values
            chosen[token, head, : len(taken)] = taken.int()
    return chosen.to(batch.positions.device)


def tiered_step(
    contexts: list[int], queries: list[int], *, num_hot: int, seed: int = 0, **options
) -> tuple[Step, Step, HotBlocks]:
    """(the step with every page on the device, the same with pages in host memory, hot blocks)."""
    nsa = options.pop("nsa", SMALL)
    step = make_step(contexts, queries, nsa, seed=seed, **options)
    tiered = spill(step, far_pages(step.batch, nsa, seed), num_hot)
    device = options.get("device", "cpu")
    num_blocks = step.compressed.k.shape[0]
    return step, tiered, make_hot(tiered.kv, num_blocks, num_hot, device=device)
