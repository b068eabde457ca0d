"""Selected pages that lie in host memory: found among the hot blocks, or fetched into them."""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import HotBlocks, PagedKV, StepBatch

Tensor = torch.Tensor


def fetch_blocks(selection: Tensor, kv: PagedKV, hot: HotBlocks, batch: StepBatch) -> Tensor:
    """Slots [T, Hkv, n] int32 of ``selection`` [T, Hkv, n], −1 where that is −1.

    A page that the slot table puts in host memory (``kv.host``) is taken from the hot blocks of its
    KV head. Those that aren't there are fetched into the hot slots used longest ago and not in this
    step, in order of their first appearance; for the rest the host's slot itself is answered.
    ``hot`` is updated in place.
    """
    expected = (batch.num_tokens, kv.k.shape[1], selection.shape[-1])
    check(selection.shape == expected, "selection is not [T, Hkv, n]", selection=selection)
    check(kv.host is not None, "there are no host pages to fetch")
    rows, pages = batch.token_rows.long()[:, None, None], selection.clamp(min=0).long()
    slots = batch.slot_table[rows, pages].where(selection >= 0, -1)
    away = slots >= kv.k.shape[0]
    if not away.any():
        return slots
    blocks = batch.block_table[rows, pages].long()
    for head in range(selection.shape[1]):
        which = away[:, head]
        asked, host_slots = blocks[:, head][which], slots[:, head][which]
        slots[:, head][which] = _fetch_head(asked, host_slots, kv, hot, head)
    return slots


def _fetch_head(
    asked: Tensor, host_slots: Tensor, kv: PagedKV, hot: HotBlocks, head: int
) -> Tensor:
    """Slots [m] of the ``asked`` blocks [m], which lie in these host slots [m]."""
    places, early = hot.places[head], hot.early[head]
    found = places[asked]
    missed, hits = found < 0, found[found >= 0].long()
    waiting = int(early.sum())
    early[hits] = 0
    foreseen = waiting - int(early.sum())
    hot.last_used[head][hits] = hot.clock
    fetched = _bring(asked[missed], host_slots[missed], kv, hot, head, hot.clock)
    early[fetched] = 0
    counts = [asked.numel(), hits.numel(), fetched.numel(), 0, foreseen]
    hot.counts.add_(torch.tensor(counts, device=asked.device))
    found = places[asked]
    return torch.where(found >= 0, hot.first_slot + found, host_slots)


def prefetch_blocks(
    wanted: Tensor, rows: Tensor, kv: PagedKV, hot: HotBlocks, batch: StepBatch, *, age: int
) -> None:
    """Bring pages ``wanted`` [R, Hkv, m] int32, −1 padded, of ``rows`` [R] into hot slots.

    Those in host memory count as used ``age`` steps ago (−1: in the next one): they take slots last
    used before that, oldest first, and stay where they are hot already. Follows the step's
    ``fetch_blocks`` of the layer; what a slot held that this step uses may still be read only where
    ``age`` is positive. ``hot`` is updated in place.
    """
    check(wanted.shape[:2] == (rows.numel(), kv.k.shape[1]), "not [R, Hkv, m]", wanted=wanted)
    check(kv.host is not None, "there are no host pages to fetch")
    table_rows, pages = rows.long()[:, None, None], wanted.clamp(min=0).long()
    slots = batch.slot_table[table_rows, pages].where(wanted >= 0, -1)
    away = slots >= kv.k.shape[0]
    blocks = batch.block_table[table_rows, pages].long()
    stamp = hot.clock - age
    for head in range(wanted.shape[1]):
        asked, host_slots = blocks[:, head][away[:, head]], slots[:, head][away[:, head]]
        found, last_used = hot.places[head][asked], hot.last_used[head]
        hits = found[found >= 0].long()
        last_used[hits] = last_used[hits].maximum(stamp)
        missed = found < 0
        brought = _bring(asked[missed], host_slots[missed], kv, hot, head, stamp)
        hot.early[head][brought] = 1
        hot.counts[3] += brought.numel()


def _bring(
    blocks: Tensor, host_slots: Tensor, kv: PagedKV, hot: HotBlocks, head: int, stamp: Tensor
) -> Tensor:
    """Hot slots [k] that ``blocks`` [m] take, those last used before ``stamp``, as if used then."""
    blocks, first = _distinct(blocks)
    order, last_used = hot.order[head].long(), hot.last_used[head]
    victims = order[last_used[order] < stamp][: blocks.numel()]
    sources = host_slots[first[: victims.numel()]].long()
    _replace(blocks[: victims.numel()], victims, hot, head)
    last_used[victims] = stamp
    _copy(kv, sources - kv.k.shape[0], hot.first_slot + victims, head)
    return victims


def _distinct(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Each of ``blocks`` [m] once, by first appearance, and where that is."""
    unique, inverse = torch.unique(blocks, return_inverse=True)
    index = torch.arange(blocks.numel(), device=blocks.device)
    first = torch.full_like(unique, blocks.numel()).scatter_reduce_(0, inverse, index, "amin")
    first = first.sort().values
    return blocks[first], first


def _replace(blocks: Tensor, victims: Tensor, hot: HotBlocks, head: int) -> None:
    """The hot slots ``victims`` [m] belong to ``blocks`` [m] from now on."""
    places, owners = hot.places[head], hot.owners[head]
    evicted = owners[victims].long()
    holds = (evicted >= 0) & (places[evicted.clamp(min=0)] == victims)
    places[evicted[holds]] = -1
    owners[victims] = blocks.int()
    places[blocks] = victims.int()


def _copy(kv: PagedKV, pages: Tensor, slots: Tensor, head: int) -> None:
    """One head's pieces of host ``pages`` [m] into device ``slots`` [m]."""
    assert kv.host is not None
    kv.k[slots, head] = kv.host.k[pages, head]
    kv.v[slots, head] = kv.host.v[pages, head]
