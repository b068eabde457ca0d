"""Second half of decode's compressed attention: scores of blocks, and the top n.

Two launches, spread over parts of a context so that a small batch fills the card. The first turns
what the splits left into one rank key per block and KV head, and merges the splits' outputs. The
second takes the top n by a bitwise search for the threshold, which yields ascending indices without
sorting. Where a context has more blocks than one program ranks, each chunk of blocks answers its
own top n, and a further launch takes the top n of those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .context_splits import log_sum, merged_splits, overlap_launches, size_of_split
from .decode_splits import num_entry_slots


@triton.jit
def _share_of_blocks(
    part_ptr,
    tile_top_ptr,
    at,
    live,
    log_total,
    pages,
    scored_pages,
    num_pages,
    PAGES: tl.constexpr,  # of a tile of the splits
):
    """[heads, blocks]: what ``part_ptr`` holds of ``pages``, as a share of the whole softmax."""
    keep = live[:, None] & (pages < scored_pages)[None, :]
    share = tl.load(part_ptr + at[:, None] * num_pages + pages[None, :], mask=keep, other=0.0)
    tiles = tl.cdiv(num_pages, PAGES)
    tile_at = at[:, None] * tiles + (pages // PAGES)[None, :]
    tile_top = tl.load(tile_top_ptr + tile_at, mask=keep, other=float("-inf"))
    return share * tl.exp2(tile_top - log_total[:, None])


@triton.jit
def _write_keys(
    own_ptr,
    prev_ptr,
    tile_top_ptr,
    to,
    at,
    live,
    log_total,
    first,
    current,
    scored_pages,
    num_pages,
    CHUNK: tl.constexpr,
    PAGES: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """Rank keys of CHUNK blocks: the bits of the group's score, the largest int where forced."""
    blocks = first + tl.arange(0, CHUNK)
    share = _share_of_blocks(
        own_ptr, tile_top_ptr, at, live, log_total, blocks, scored_pages, num_pages, PAGES
    )
    share += _share_of_blocks(
        prev_ptr, tile_top_ptr, at, live, log_total, blocks + 1, scored_pages, num_pages, PAGES
    )
    forced = (blocks < INITIAL) | (blocks > current - LOCAL)
    key = tl.where(forced, 0x7FFFFFFF, tl.sum(share, 0).to(tl.int32, bitcast=True))
    tl.store(to + blocks, key, mask=blocks <= current)


@triton.jit(do_not_specialize=["first_token"])
def score_and_merge(
    positions_ptr,
    token_rows_ptr,
    context_lens_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    own_ptr,
    prev_ptr,
    tile_top_ptr,
    key_ptr,  # [tokens, Hkv, pages] int32
    out_ptr,  # [T, Hq, Dv]
    first_token,
    num_pages,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEADS: tl.constexpr,  # whose splits a part merges at a time
    SINGLE: tl.constexpr,  # every row has one token
    CHUNK: tl.constexpr,  # blocks
    PAGES: tl.constexpr,  # of a tile of the splits
    WITH_OUTPUT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        overlap_launches()
    GROUP: tl.constexpr = HQ // HKV
    part = tl.program_id(0)
    head = tl.program_id(1)
    scratch_token = tl.program_id(2)
    token = first_token + scratch_token
    position = tl.load(positions_ptr + token).to(tl.int32)
    context = position + 1
    if not SINGLE:
        context = tl.load(context_lens_ptr + tl.load(token_rows_ptr + token))
    num_slots = num_entry_slots(tl.where(position < 0, 0, context), LEN, STRIDE)
    num_splits = tl.cdiv(num_slots, size_of_split(num_slots, MIN_SPLIT, SPREAD))
    first_head = scratch_token.to(tl.int64) * HQ + head * GROUP
    current = tl.where(position < 0, -1, position // PAGE)
    if (current >= SELECTED) & (part * CHUNK <= current):
        in_group = tl.arange(0, GROUP_PAD)
        live = in_group < GROUP
        at = first_head + in_group
        log_total = log_sum(max_ptr, sum_ptr, at, live, num_splits, SPLITS, SPLITS_PAD)
        to = key_ptr + (scratch_token.to(tl.int64) * HKV + head) * num_pages
        scored_pages = tl.cdiv(num_slots, PAGE // STRIDE)
        for first in range(part * CHUNK, current + 1, tl.num_programs(0) * CHUNK):
            _write_keys(
                own_ptr, prev_ptr, tile_top_ptr, to, at, live, log_total, first, current,
                scored_pages, num_pages, CHUNK, PAGES, INITIAL, LOCAL,
            )  # fmt: skip
    if WITH_OUTPUT:
        dv = tl.arange(0, DV_PAD)
        for first in range(part * HEADS, GROUP, tl.num_programs(0) * HEADS):
            merged = first + tl.arange(0, HEADS)
            live = merged < GROUP
            out = merged_splits(
                max_ptr, sum_ptr, acc_ptr, first_head + merged, live, num_splits,
                DV, DV_PAD, SPLITS, SPLITS_PAD,
            )  # fmt: skip
            out_at = (token.to(tl.int64) * HQ + head * GROUP + merged)[:, None] * DV + dv[None, :]
            keep = live[:, None] & (dv < DV)[None, :]
            tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _threshold(key, WANTED: tl.constexpr):
    """The largest x >= 0 with at least WANTED keys >= x, two bits a round; 0 where fewer are.

    Keys are below 2^20 in number: a round counts those above three values in one sum.
    """
    x = tl.sum(key * 0, 0)
    # Not unrolled: instructions that are fetched once are waited for once.
    for step in range(15):
        shift = 29 - 2 * step
        low = (key >= x + (1 << shift)).to(tl.int64)
        middle = (key >= x + (2 << shift)).to(tl.int64)
        high = (key >= x + (3 << shift)).to(tl.int64)
        counts = tl.sum(low + (middle << 20) + (high << 40), 0)
        digit = ((counts & 0xFFFFF) >= WANTED).to(tl.int32)
        digit += (((counts >> 20) & 0xFFFFF) >= WANTED).to(tl.int32)
        digit += ((counts >> 40) >= WANTED).to(tl.int32)
        x += digit << shift
    last = tl.sum((key > x).to(tl.int32), 0)
    return x + (last >= WANTED).to(tl.int32)


@triton.jit
def _top_ranks(key, WANTED: tl.constexpr):
    """Which of the keys (negative: none) are the WANTED highest, first come first on a tie.

    Returns (taken, rank among the taken in order of appearance, how many are taken).
    """
    x = _threshold(key, WANTED)
    above = (key > x).to(tl.int32)
    equal = (key == x).to(tl.int32)
    both = above + (equal << 16)
    before = tl.cumsum(both, 0) - both
    sums = tl.sum(both, 0)
    wanted_equal = WANTED - (sums & 0xFFFF)
    equal_before = before >> 16
    taken = (above > 0) | ((equal > 0) & (equal_before < wanted_equal))
    rank = (before & 0xFFFF) + tl.minimum(equal_before, wanted_equal)
    return taken, rank, (sums & 0xFFFF) + tl.minimum(sums >> 16, wanted_equal)


@triton.jit
def list_blocks(
    to,
    key_to,
    count,
    first,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    WITH_KEYS: tl.constexpr,
):
    """Answer the ``count`` blocks from ``first`` on, all of them above every score."""
    places = tl.arange(0, SELECTED_PAD)
    inside = places < SELECTED
    tl.store(to + places, tl.where(places < count, first + places, -1), mask=inside)
    if WITH_KEYS:
        tl.store(key_to + places, tl.where(places < count, 0x7FFFFFFF, -1), mask=inside)


@triton.jit
def _rank_blocks(
    keys,
    to,
    key_to,
    first,
    current,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    WITH_KEYS: tl.constexpr,
):
    """Answer the top n of the BLOCKS blocks from ``first`` on."""
    blocks = first + tl.arange(0, BLOCKS)
    key = tl.load(keys + blocks, mask=blocks <= current, other=-1)
    taken, rank, count = _top_ranks(key, SELECTED)
    places = tl.arange(0, SELECTED_PAD)
    empty = (places >= count) & (places < SELECTED)
    tl.store(to + rank, blocks, mask=taken)
    tl.store(to + places, -1, mask=empty)
    if WITH_KEYS:
        tl.store(key_to + rank, key, mask=taken)
        tl.store(key_to + places, -1, mask=empty)


@triton.jit(do_not_specialize=["first_token"])
def select_of_keys(
    positions_ptr,
    key_ptr,  # [tokens, Hkv, pages] int32
    selection_ptr,  # [T, Hkv, n]
    chosen_key_ptr,  # [tokens, Hkv, chunks, n], where there is more than one chunk
    chosen_ptr,
    first_token,
    num_pages,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    CHUNK: tl.constexpr,  # blocks
    CHUNKS: tl.constexpr,
    SIZES: tl.constexpr,  # of tiles: the chunk, its half, ...
    PDL: tl.constexpr,
):
    """The top n of each chunk of blocks, ascending; the selection itself where it is one chunk."""
    if PDL:
        overlap_launches()
    part = tl.program_id(0)
    head = tl.program_id(1)
    scratch_token = tl.program_id(2)
    token = first_token + scratch_token
    position = tl.load(positions_ptr + token).to(tl.int32)
    first = part * CHUNK
    current = tl.where(position < 0, -1, position // PAGE)
    keys = key_ptr + (scratch_token.to(tl.int64) * HKV + head) * num_pages
    if CHUNKS == 1:
        to = selection_ptr + (token.to(tl.int64) * HKV + head) * SELECTED
        key_to = to
    else:
        at = ((scratch_token.to(tl.int64) * HKV + head) * CHUNKS + part) * SELECTED
        to = chosen_ptr + at
        key_to = chosen_key_ptr + at
    reach = current - first
    if (current < SELECTED) | (reach < 0):
        list_blocks(to, key_to, reach + 1, first, SELECTED, SELECTED_PAD, CHUNKS > 1)
    else:
        # The chunk follows from a bound, and most contexts are far shorter: the smallest tile that
        # holds what there is.
        for halvings in tl.static_range(SIZES):
            fits = reach < (CHUNK >> halvings)
            if fits & ((reach >= (CHUNK >> (halvings + 1))) | (halvings == SIZES - 1)):
                _rank_blocks(
                    keys, to, key_to, first, current, SELECTED, SELECTED_PAD, CHUNK >> halvings,
                    CHUNKS > 1,
                )  # fmt: skip
        if reach >= CHUNK:
            _rank_blocks(
                keys, to, key_to, first, current, SELECTED, SELECTED_PAD, CHUNK, CHUNKS > 1
            )


@triton.jit(do_not_specialize=["first_token"])
def select_of_chunks(
    key_ptr,  # [tokens, Hkv, chunks, n]
    block_ptr,
    selection_ptr,  # [T, Hkv, n]
    first_token,
    HKV: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CANDIDATES_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The top n of the chunks' top n: chunks ascend and so do their blocks, so ties keep order."""
    if PDL:
        overlap_launches()
    head = tl.program_id(0)
    scratch_token = tl.program_id(1)
    at = (scratch_token.to(tl.int64) * HKV + head) * CANDIDATES
    places = tl.arange(0, CANDIDATES_PAD)
    key = tl.load(key_ptr + at + places, mask=places < CANDIDATES, other=-1)
    blocks = tl.load(block_ptr + at + places, mask=places < CANDIDATES, other=-1)
    taken, rank, count = _top_ranks(key, SELECTED)
    to = selection_ptr + ((first_token + scratch_token).to(tl.int64) * HKV + head) * SELECTED
    tl.store(to + rank, blocks, mask=taken)
    rest = tl.arange(0, SELECTED_PAD)
    tl.store(to + rest, -1, mask=(rest >= count) & (rest < SELECTED))
