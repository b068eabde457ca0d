"""Selected pages that lie in host memory: found among the hot blocks, or fetched into them.

Three launches, no host sync: all look-ups mark what they use and claim what they miss; one program
a KV head gives the first claimant of each block a hot slot; many programs read the missing pieces
from host memory in place. Grids depend on shapes alone, so that a CUDA graph can hold them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import UNCLAIMED, HotBlocks, PagedKV, StepBatch

Tensor = torch.Tensor

_ITEMS = 1024  # look-ups of a program, and of a turn of the assignment
_FETCHERS = 64  # programs a KV head: enough loads under way to fill the link to the host
_FETCHERS_AHEAD = 16  # few, since others compute meanwhile


@triton.jit
def _misses(
    selection_ptr,
    token_rows_ptr,
    block_table_ptr,
    out_ptr,
    item,
    head,
    num_items,
    num_slots,
    stride_blocks,
    HKV: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """(place, slot, whether its page is missed, block id) of a KV head's look-ups ``item``."""
    token = item // SELECTED
    at = (token.to(tl.int64) * HKV + head) * SELECTED + item % SELECTED
    slot = tl.load(out_ptr + at, mask=item < num_items, other=-1)
    missed = slot >= num_slots
    page = tl.load(selection_ptr + at, mask=missed, other=0)
    row = tl.load(token_rows_ptr + token, mask=missed, other=0).to(tl.int64)
    block = tl.load(block_table_ptr + row * stride_blocks + page, mask=missed, other=0)
    return at, slot, missed, block


@triton.jit
def _look_up(
    selection_ptr,  # [T, Hkv, n]
    token_rows_ptr,  # [T]
    block_table_ptr,  # [B, M]
    slot_table_ptr,  # [B, M]
    out_ptr,  # [T, Hkv, n]
    places_ptr,  # [Hkv, N]
    last_used_ptr,  # [Hkv, H]
    early_ptr,  # [Hkv, H]
    claims_ptr,  # [Hkv, N]
    clock_ptr,
    counts_ptr,
    age,
    num_items,  # T·n
    num_slots,
    first_slot,
    num_blocks,
    num_hot,
    stride_blocks,
    stride_slots,
    HKV: tl.constexpr,
    SELECTED: tl.constexpr,
    ITEMS: tl.constexpr,
    AHEAD: tl.constexpr,  # for a later step: nothing is read here
):
    """Slots of ITEMS look-ups of a KV head; a miss keeps the host's slot."""
    head = tl.program_id(1)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    token = item // SELECTED
    at = (token.to(tl.int64) * HKV + head) * SELECTED + item % SELECTED
    page = tl.load(selection_ptr + at, mask=item < num_items, other=-1)
    chosen = page >= 0
    row = tl.load(token_rows_ptr + token, mask=chosen, other=0).to(tl.int64)
    slot = tl.load(slot_table_ptr + row * stride_slots + page, mask=chosen, other=-1)
    away = slot >= num_slots
    block = tl.load(block_table_ptr + row * stride_blocks + page, mask=away, other=0)
    place = tl.load(places_ptr + head * num_blocks + block, mask=away, other=-1)
    hit = away & (place >= 0)
    missed = away & (place < 0)
    at_place = head * num_hot + place
    stamp = tl.load(clock_ptr) - age
    if AHEAD:
        tl.atomic_max(last_used_ptr + at_place, stamp, mask=hit)
    else:
        tl.store(last_used_ptr + at_place, stamp, mask=hit)
    # The smallest claimant wins, whichever program comes first.
    tl.atomic_min(claims_ptr + head * num_blocks + block, item, mask=missed)
    tl.store(out_ptr + at, tl.where(hit, first_slot + place, slot), mask=item < num_items)
    if not AHEAD:
        foreseen = tl.load(early_ptr + at_place, mask=hit, other=0) > 0
        # Of several look-ups of a piece one counts.
        first = tl.atomic_xchg(early_ptr + at_place, 0, mask=foreseen)
        tl.atomic_add(counts_ptr, tl.sum(away.to(tl.int64), 0))
        tl.atomic_add(counts_ptr + 1, tl.sum(hit.to(tl.int64), 0))
        tl.atomic_add(counts_ptr + 4, tl.sum(tl.where(foreseen, first, 0).to(tl.int64), 0))


@triton.jit
def _list_victims(order_ptr, last_used_ptr, victims_ptr, stamp, num_hot, ITEMS: tl.constexpr):
    """Hot slots last used before ``stamp``, the one used longest ago first. Says how many."""
    found = 0
    for start in range(0, num_hot, ITEMS):
        index = start + tl.arange(0, ITEMS)
        slot = tl.load(order_ptr + index, mask=index < num_hot, other=0)
        used = tl.load(last_used_ptr + slot, mask=index < num_hot, other=stamp)
        free = ((index < num_hot) & (used < stamp)).to(tl.int32)
        tl.store(victims_ptr + found + tl.cumsum(free, 0) - 1, slot, mask=free > 0)
        found += tl.sum(free, 0)
    return found


@triton.jit
def _assign(
    selection_ptr,
    token_rows_ptr,
    block_table_ptr,
    out_ptr,
    owners_ptr,  # [Hkv, H]
    places_ptr,
    last_used_ptr,
    early_ptr,
    order_ptr,  # [Hkv, H]
    claims_ptr,
    victims_ptr,  # [Hkv, H]
    fetched_ptr,  # [Hkv, H]
    num_fetched_ptr,  # [Hkv]
    clock_ptr,
    counts_ptr,
    age,
    num_items,
    num_slots,
    num_blocks,
    num_hot,
    stride_blocks,
    HKV: tl.constexpr,
    SELECTED: tl.constexpr,
    ITEMS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Hot slots for the blocks that one KV head misses, by first appearance."""
    head = tl.program_id(0)
    stamp = tl.load(clock_ptr) - age
    owners, places = owners_ptr + head * num_hot, places_ptr + head * num_blocks
    last_used, victims = last_used_ptr + head * num_hot, victims_ptr + head * num_hot
    num_victims = _list_victims(
        order_ptr + head * num_hot, last_used, victims, stamp, num_hot, ITEMS
    )
    tl.debug_barrier()  # other threads of this program read what these have listed
    missing = 0
    for start in range(0, num_items, ITEMS):
        item = start + tl.arange(0, ITEMS)
        _at, slot, missed, block = _misses(
            selection_ptr, token_rows_ptr, block_table_ptr, out_ptr, item, head, num_items,
            num_slots, stride_blocks, HKV, SELECTED,
        )  # fmt: skip
        claim = tl.load(claims_ptr + head * num_blocks + block, mask=missed, other=-1)
        leads = (missed & (claim == item)).to(tl.int32)
        rank = missing + tl.cumsum(leads, 0) - 1
        takes = (leads > 0) & (rank < num_victims)
        victim = tl.load(victims + rank, mask=takes, other=0)
        evicted = tl.load(owners + victim, mask=takes, other=-1)
        held = tl.load(places + evicted, mask=takes & (evicted >= 0), other=-1)
        tl.store(places + evicted, -1, mask=takes & (evicted >= 0) & (held == victim))
        tl.store(owners + victim, block, mask=takes)
        tl.store(places + block, victim, mask=takes)
        tl.store(last_used + victim, stamp, mask=takes)
        tl.store(early_ptr + head * num_hot + victim, 1 if AHEAD else 0, mask=takes)
        tl.store(fetched_ptr + head * num_hot + rank, slot - num_slots, mask=takes)
        missing += tl.sum(leads, 0)
    count = tl.minimum(missing, num_victims)
    tl.store(num_fetched_ptr + head, count)
    tl.atomic_add(counts_ptr + (3 if AHEAD else 2), count.to(tl.int64))


@triton.jit
def _copy_piece(
    source_ptr,
    target_ptr,
    source,
    target,
    head,
    stride_s,
    stride_h,
    stride_p,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    tokens, dims = tl.arange(0, PAGE_PAD), tl.arange(0, D_PAD)
    within = head * stride_h + tokens[:, None] * stride_p + dims[None, :]
    mask = (tokens < PAGE)[:, None] & (dims < D)[None, :]
    piece = tl.load(source_ptr + source.to(tl.int64) * stride_s + within, mask=mask)
    tl.store(target_ptr + target.to(tl.int64) * stride_s + within, piece, mask=mask)


@triton.jit
def _fetch(
    k_ptr,  # [S, Hkv, P, Dk]
    v_ptr,
    host_k_ptr,
    host_v_ptr,
    selection_ptr,
    token_rows_ptr,
    block_table_ptr,
    out_ptr,
    places_ptr,
    claims_ptr,
    victims_ptr,
    fetched_ptr,
    num_fetched_ptr,
    num_items,
    num_slots,
    first_slot,
    num_blocks,
    num_hot,
    stride_blocks,
    stride_ks,
    stride_kh,
    stride_kp,
    stride_vs,
    stride_vh,
    stride_vp,
    HKV: tl.constexpr,
    SELECTED: tl.constexpr,
    ITEMS: tl.constexpr,
    FETCHERS: tl.constexpr,
    UNCLAIMED_ITEM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    DK: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Read a share of the missing pieces; answer a share of the misses; clear their claims."""
    share = tl.program_id(0)
    head = tl.program_id(1)
    for turn in range(share, tl.load(num_fetched_ptr + head), FETCHERS):
        source = tl.load(fetched_ptr + head * num_hot + turn)
        target = first_slot + tl.load(victims_ptr + head * num_hot + turn)
        _copy_piece(
            host_k_ptr, k_ptr, source, target, head, stride_ks, stride_kh, stride_kp,
            PAGE, PAGE_PAD, DK, DK_PAD,
        )  # fmt: skip
        _copy_piece(
            host_v_ptr, v_ptr, source, target, head, stride_vs, stride_vh, stride_vp,
            PAGE, PAGE_PAD, DV, DV_PAD,
        )  # fmt: skip
    for start in range(share * ITEMS, num_items, FETCHERS * ITEMS):
        item = start + tl.arange(0, ITEMS)
        at, _slot, missed, block = _misses(
            selection_ptr, token_rows_ptr, block_table_ptr, out_ptr, item, head, num_items,
            num_slots, stride_blocks, HKV, SELECTED,
        )  # fmt: skip
        place = tl.load(places_ptr + head * num_blocks + block, mask=missed, other=-1)
        tl.store(out_ptr + at, first_slot + place, mask=missed & (place >= 0))
        tl.store(claims_ptr + head * num_blocks + block, UNCLAIMED_ITEM, mask=missed)


def fetch_blocks(selection: Tensor, kv: PagedKV, hot: HotBlocks, batch: StepBatch) -> Tensor:
    """Slots [T, Hkv, n] int32 of ``selection`` [T, Hkv, n], −1 where that is −1.

    A page that the slot table puts in host memory (``kv.host``) is taken from the hot blocks of its
    KV head. Those that aren't there are fetched into the hot slots used longest ago and not in this
    step, in order of their first appearance; for the rest the host's slot itself is answered.
    ``hot`` is updated in place. Raises ``ContractError`` where shapes don't fit.
    """
    expected = (batch.num_tokens, kv.k.shape[1], selection.shape[-1])
    check(selection.shape == expected, "selection is not [T, Hkv, n]", selection=selection)
    return _resolve(selection, batch.token_rows, kv, hot, batch, age=0, ahead=False)


def prefetch_blocks(
    wanted: Tensor, rows: Tensor, kv: PagedKV, hot: HotBlocks, batch: StepBatch, *, age: int
) -> None:
    """Bring pages ``wanted`` [R, Hkv, m] int32, −1 padded, of ``rows`` [R] int32 into hot slots.

    Those in host memory count as used ``age`` steps ago (−1: in the next one): they take slots last
    used before that, oldest first, and stay where they are hot already. Follows the step's
    ``fetch_blocks`` of the layer; what a slot held that this step uses may still be read only where
    ``age`` is positive. ``hot`` is updated in place. Raises ``ContractError`` where shapes don't
    fit.
    """
    check(wanted.shape[:2] == (rows.numel(), kv.k.shape[1]), "not [R, Hkv, m]", wanted=wanted)
    _resolve(wanted, rows, kv, hot, batch, age=age, ahead=True)


def _resolve(
    pages: Tensor,
    rows: Tensor,
    kv: PagedKV,
    hot: HotBlocks,
    batch: StepBatch,
    *,
    age: int,
    ahead: bool,
) -> Tensor:
    """Slots [R, Hkv, m] of ``pages`` [R, Hkv, m]; hot slots used before ``age`` steps ago turn."""
    check(pages.is_contiguous(), "pages must be contiguous", pages=pages)
    check(kv.host is not None, "there are no host pages to fetch")
    host, (tokens, num_heads, selected), num_slots = kv.host or kv, pages.shape, kv.k.shape[0]
    num_blocks, num_hot = hot.places.shape[1], hot.owners.shape[1]
    slots = torch.empty_like(pages)
    num_items = tokens * selected
    if num_items == 0:
        return slots
    sizes = {"HKV": num_heads, "SELECTED": selected, "ITEMS": _ITEMS}
    blocks = batch.block_table
    _look_up[triton.cdiv(num_items, _ITEMS), num_heads](
        pages, rows, blocks, batch.slot_table, slots, hot.places, hot.last_used, hot.early,
        hot.claims, hot.clock, hot.counts, age, num_items, num_slots, hot.first_slot, num_blocks,
        num_hot, blocks.stride(0), batch.slot_table.stride(0), **sizes, AHEAD=ahead,
    )  # fmt: skip
    _assign[(num_heads,)](
        pages, rows, blocks, slots, hot.owners, hot.places, hot.last_used, hot.early, hot.order,
        hot.claims, hot.victims, hot.fetched, hot.num_fetched, hot.clock, hot.counts, age,
        num_items, num_slots, num_blocks, num_hot, blocks.stride(0), **sizes, AHEAD=ahead,
    )  # fmt: skip
    page, dk, dv = kv.k.shape[2], kv.k.shape[3], kv.v.shape[3]
    fetchers = min(_FETCHERS_AHEAD if ahead else _FETCHERS, num_hot)
    _fetch[fetchers, num_heads](
        kv.k, kv.v, host.k, host.v, pages, rows, blocks, slots, hot.places,
        hot.claims, hot.victims, hot.fetched, hot.num_fetched, num_items, num_slots,
        hot.first_slot, num_blocks, num_hot, blocks.stride(0), *kv.k.stride()[:3],
        *kv.v.stride()[:3], **sizes, FETCHERS=fetchers, UNCLAIMED_ITEM=UNCLAIMED,
        PAGE=page, PAGE_PAD=triton.next_power_of_2(page), DK=dk,
        DK_PAD=triton.next_power_of_2(dk), DV=dv, DV_PAD=triton.next_power_of_2(dv),
    )  # fmt: skip
    return slots
