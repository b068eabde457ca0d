"""Second half of decode's compressed attention: scores of blocks, and the top n.

The top n are found by a bitwise search for the threshold, which yields ascending indices without
sorting. Where a context has more blocks than one program ranks, each chunk of blocks answers its
own top n, and a further launch takes the top n of those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .context_splits import log_sum, size_of_split


@triton.jit
def num_entry_slots(context, LEN: tl.constexpr, STRIDE: tl.constexpr):
    """Entry slots of a row, up to and including its last visible entry; 0 where none is."""
    visible = tl.where(context < LEN, 0, (context - LEN) // STRIDE + 1)
    return tl.where(visible > 0, visible + LEN // STRIDE - 1, 0)


@triton.jit
def slots_of_token(
    positions_ptr, token_rows_ptr, context_lens_ptr, token, LEN: tl.constexpr, STRIDE: tl.constexpr
):
    """``num_entry_slots`` of a token's row; 0 for padding."""
    context = tl.load(context_lens_ptr + tl.load(token_rows_ptr + token))
    return num_entry_slots(tl.where(tl.load(positions_ptr + token) < 0, 0, context), LEN, STRIDE)


@triton.jit
def _threshold(key, WANTED: tl.constexpr):
    """The largest x ≥ 0 with at least WANTED keys ≥ x, two bits a round; 0 where fewer are."""
    x = tl.sum(key * 0, 0)
    for step in tl.static_range(15):
        shift = 29 - 2 * step
        low = (key >= x + (1 << shift)).to(tl.int32)
        middle = (key >= x + (2 << shift)).to(tl.int32)
        both = tl.sum(low + (middle << 16), 0)
        high = tl.sum((key >= x + (3 << shift)).to(tl.int32), 0)
        digit = ((both & 0xFFFF) >= WANTED).to(tl.int32) + ((both >> 16) >= WANTED).to(tl.int32)
        x += (digit + (high >= WANTED).to(tl.int32)) << shift
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
def _block_keys(
    max_ptr,
    sum_ptr,
    own_ptr,
    prev_ptr,
    scratch_token,
    head,
    blocks,
    current,
    num_splits,
    scored_pages,
    num_pages,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Rank keys of blocks: the bits of the group's score, the largest int where forced, else -1."""
    GROUP: tl.constexpr = HQ // HKV
    score = tl.zeros(blocks.shape, tl.float32)
    for first in tl.range(0, GROUP, HEADS, loop_unroll_factor=4):
        in_group = first + tl.arange(0, HEADS)
        live = in_group < GROUP
        at = scratch_token.to(tl.int64) * HQ + head * GROUP + in_group
        log_total = log_sum(max_ptr, sum_ptr, at, live, num_splits, SPLITS, SPLITS_PAD)
        where = at[:, None] * num_pages + blocks[None, :]
        own = tl.load(
            own_ptr + where,
            mask=live[:, None] & (blocks < scored_pages)[None, :],
            other=float("-inf"),
        )
        following = tl.load(
            prev_ptr + where + 1,
            mask=live[:, None] & (blocks + 1 < scored_pages)[None, :],
            other=float("-inf"),
        )
        share = tl.exp2(own - log_total[:, None]) + tl.exp2(following - log_total[:, None])
        score += tl.sum(share, 0)
    forced = (blocks < INITIAL) | (blocks > current - LOCAL)
    key = tl.where(forced, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))
    return tl.where(blocks <= current, key, -1)


@triton.jit
def _list_blocks(
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
    max_ptr,
    sum_ptr,
    own_ptr,
    prev_ptr,
    to,
    key_to,
    scratch_token,
    head,
    first,
    current,
    num_splits,
    scored_pages,
    num_pages,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    SCORES: tl.constexpr,  # of one tile
    GROUP_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    WITH_KEYS: tl.constexpr,
):
    """Answer the top n of the BLOCKS blocks from ``first`` on."""
    MOST: tl.constexpr = SCORES // BLOCKS if SCORES > BLOCKS else 1
    HEADS: tl.constexpr = MOST if MOST < GROUP_PAD else GROUP_PAD
    blocks = first + tl.arange(0, BLOCKS)
    key = _block_keys(
        max_ptr, sum_ptr, own_ptr, prev_ptr, scratch_token, head, blocks, current, num_splits,
        scored_pages, num_pages, HQ, HKV, INITIAL, LOCAL, HEADS, SPLITS, SPLITS_PAD,
    )  # fmt: skip
    taken, rank, count = _top_ranks(key, SELECTED)
    places = tl.arange(0, SELECTED_PAD)
    empty = (places >= count) & (places < SELECTED)
    tl.store(to + rank, blocks, mask=taken)
    tl.store(to + places, -1, mask=empty)
    if WITH_KEYS:
        tl.store(key_to + rank, key, mask=taken)
        tl.store(key_to + places, -1, mask=empty)


@triton.jit(do_not_specialize=["first_token"])
def select_of_pages(
    positions_ptr,
    token_rows_ptr,
    context_lens_ptr,
    max_ptr,
    sum_ptr,
    own_ptr,
    prev_ptr,
    selection_ptr,  # [T, Hkv, n]
    key_ptr,  # [tokens, Hkv, chunks, n], where there is more than one chunk
    block_ptr,
    first_token,
    num_pages,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    LEN: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,  # blocks
    CHUNKS: tl.constexpr,
    SCORES: tl.constexpr,  # of one tile
    GROUP_PAD: tl.constexpr,
):
    # Tiles of blocks of three sizes: the chunk follows from a bound, most contexts are far shorter.
    FEW: tl.constexpr = CHUNK if CHUNK < 128 else 128
    SOME: tl.constexpr = CHUNK // 4 if CHUNK > 512 else FEW
    part = tl.program_id(0)
    head = tl.program_id(1)
    scratch_token = tl.program_id(2)
    token = first_token + scratch_token
    position = tl.load(positions_ptr + token).to(tl.int32)
    num_slots = slots_of_token(positions_ptr, token_rows_ptr, context_lens_ptr, token, LEN, STRIDE)
    num_splits = tl.cdiv(num_slots, size_of_split(num_slots, MIN_SPLIT, SPREAD))
    first = part * CHUNK
    current = tl.where(position < 0, -1, position // PAGE)
    scored_pages = tl.cdiv(num_slots, PAGE // STRIDE)
    if CHUNKS == 1:
        to = selection_ptr + (token.to(tl.int64) * HKV + head) * SELECTED
        key_to = to
    else:
        at = ((scratch_token.to(tl.int64) * HKV + head) * CHUNKS + part) * SELECTED
        to = block_ptr + at
        key_to = key_ptr + at
    if (current < SELECTED) | (current < first):
        _list_blocks(to, key_to, current + 1 - first, first, SELECTED, SELECTED_PAD, CHUNKS > 1)
    elif current - first < FEW:
        _rank_blocks(
            max_ptr, sum_ptr, own_ptr, prev_ptr, to, key_to, scratch_token, head, first,
            current, num_splits, scored_pages, num_pages, HQ, HKV, INITIAL, LOCAL, SELECTED,
            SELECTED_PAD, SCORES, GROUP_PAD, SPLITS, SPLITS_PAD, FEW, CHUNKS > 1,
        )  # fmt: skip
    elif current - first < SOME:
        _rank_blocks(
            max_ptr, sum_ptr, own_ptr, prev_ptr, to, key_to, scratch_token, head, first,
            current, num_splits, scored_pages, num_pages, HQ, HKV, INITIAL, LOCAL, SELECTED,
            SELECTED_PAD, SCORES, GROUP_PAD, SPLITS, SPLITS_PAD, SOME, CHUNKS > 1,
        )  # fmt: skip
    else:
        _rank_blocks(
            max_ptr, sum_ptr, own_ptr, prev_ptr, to, key_to, scratch_token, head, first,
            current, num_splits, scored_pages, num_pages, HQ, HKV, INITIAL, LOCAL, SELECTED,
            SELECTED_PAD, SCORES, GROUP_PAD, SPLITS, SPLITS_PAD, CHUNK, CHUNKS > 1,
        )  # fmt: skip


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
):
    """The top n of the chunks' top n: chunks ascend and so do their blocks, so ties keep order."""
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
