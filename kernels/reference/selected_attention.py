"""Attention over the selected blocks (paper, section 3.3.2)."""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .dense_attention import attend_prefix, dense_attention
from .paged import QueryTile, check_queries, gather_both, long_rows, places_of_both
from .select_blocks import every_block
from .softmax_attention import attend_tile, weighted_values
from .tiers import joined
from .token_groups import TokenGroup, attend_group, token_groups, zeros

Tensor = torch.Tensor

# Larger tiles share more loads and read more blocks that few of their tokens chose.
_TILE = 64
# Where every block is read anyway, only the steps per tile count.
_MASKED_TILE = 256


def selected_attention(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of ``q`` [T, Hq, Dk] over each token's selected blocks, causal: [T, Hq, Dv].

    ``selection`` [T, Hkv, n] holds block indices within the request, ascending, −1 for none.
    ``slots`` [T, Hkv, n] says where those pages are on the device; None: the slot table does.
    A token without blocks, such as padding, gets 0.
    """
    check_queries(q, kv, batch)
    expected = (q.shape[0], kv.k.shape[1], nsa.num_selected)
    check(selection.shape == expected, "selection is not [T, Hkv, n]", selection=selection)
    check(slots is None or slots.shape == expected, "slots are not [T, Hkv, n]", slots=slots)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", k=kv.k, P=nsa.page)
    kv = joined(kv)
    if slots is None and selection is every_block(batch, kv.k.shape[1], nsa):
        return dense_attention(q, kv, batch)
    out = None
    for group in token_groups(batch, nsa.page, kv.k.dtype, most=nsa.num_selected):
        attended = _attend_group(q, kv, selection, slots, batch, group)
        if group.tokens is None:
            return attended
        out = zeros(q, kv) if out is None else out
        out[group.tokens] = attended
    out = zeros(q, kv) if out is None else out
    for row in long_rows(batch):
        _attend_row(q, kv, selection, slots, batch, row, out)
    return out


def _attend_group(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    slots: Tensor | None,
    batch: StepBatch,
    group: TokenGroup,
) -> Tensor:
    """Attention of a group's tokens over the blocks that each KV head chose: [g, Hq, Dv]."""
    chosen = group.own(selection)  # [g, Hkv, n]
    if slots is None:
        where = batch.slot_table[group.rows, chosen.clamp(min=0).long()]
    else:
        where = group.own(slots)
    last = chosen[:, :, group.num_pages - 1]
    if bool((last == group.current).all()):
        where = where[:, :, : group.num_pages]
        return attend_group(q, kv, group, places_of_both(where, kv))
    return _attend_any(group.own(q), kv, chosen, where, group.own(batch.positions))


def _attend_any(q: Tensor, kv: PagedKV, chosen: Tensor, where: Tensor, positions: Tensor) -> Tensor:
    """Attention of ``q`` [g, Hq, Dk] over any blocks ``chosen`` [g, Hkv, n], in fp32.

    Not even the current page need be among them, nor as many for one head as for another.
    """
    tokens, heads, dim = q.shape
    num_kv_heads, page = kv.k.shape[1:3]
    keys = chosen[..., None] * page + torch.arange(page, device=q.device)
    hidden = (keys > positions[:, None, None, None]) | (chosen < 0)[..., None]
    hidden = hidden.flatten(2)  # [g, Hkv, n·P]
    k, v = gather_both(kv, where)
    # Masked keys too: a bias of −inf does not hide the NaN of unwritten memory.
    k = k.float().masked_fill_(hidden[..., None], 0)
    v = v.float().masked_fill_(hidden[..., None], 0)
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    queries = q.float().reshape(tokens, num_kv_heads, -1, dim)
    out = weighted_values(queries, k, v, bias[:, :, None])
    out.masked_fill_(hidden.all(-1)[..., None, None], 0)
    return out.reshape(tokens, heads, -1).to(q.dtype)


def _attend_row(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    slots: Tensor | None,
    batch: StepBatch,
    row: QueryTile,
    out: Tensor,
) -> None:
    dense = _dense_start(selection, batch, row, kv.k.shape[2])
    if dense:
        start = QueryTile(row.row, row.start, row.start + dense, row.first)
        attend_prefix(q, kv, batch, start, out)
    rest = QueryTile(row.row, row.start + dense, row.stop, row.first + dense)
    masked = _masked_size(selection.shape[-1], batch, rest, kv.k.shape[2])
    part = QueryTile(rest.row, rest.start, rest.start + masked, rest.first)
    _attend_masked(q, kv, selection, batch, part, out)
    rest = QueryTile(rest.row, part.stop, rest.stop, rest.first + masked)
    for tile in rest.split(_TILE):
        out[tile.tokens] = _attend_union(q, kv, selection, slots, batch, tile)


def _is_in_table(batch: StepBatch, part: QueryTile, page: int) -> bool:
    """Whether the slot table knows every page of ``part``, whatever slots are given beside it."""
    return bool((batch.slot_table[part.row, : part.last // page + 1] >= 0).all())


def _dense_start(selection: Tensor, batch: StepBatch, row: QueryTile, page: int) -> int:
    """How many tokens at the row's start chose every block, so that attention is plainly causal."""
    if row.first >= selection.shape[-1] * page or not _is_in_table(batch, row, page):
        return 0
    chosen = (selection[row.tokens] >= 0).sum(-1)
    candidates = batch.positions[row.tokens] // page + 1
    whole = (chosen == candidates[:, None]).all(-1)
    return int(whole.int().cumprod(0).sum())


def _masked_size(num_selected: int, batch: StepBatch, part: QueryTile, page: int) -> int:
    """How many first tokens of ``part`` to attend over every block, those not chosen masked.

    Up to about 2·n blocks that is faster than gathering the union of a tile's blocks.
    """
    count = min(part.size, 2 * num_selected * page - part.first)
    if count <= 0:
        return 0
    whole = QueryTile(part.row, part.start, part.start + count, part.first)
    return count if _is_in_table(batch, whole, page) else 0


def _attend_masked(
    q: Tensor, kv: PagedKV, selection: Tensor, batch: StepBatch, part: QueryTile, out: Tensor
) -> None:
    """Attention of ``part`` over every key of its row up to it, masked by block."""
    page = kv.k.shape[2]
    slots = batch.slot_table[part.row, None, : part.last // page + 1]
    k, v = gather_both(kv, slots)
    for tile in part.split(_MASKED_TILE):
        length, num_blocks = tile.last + 1, tile.last // page + 1
        bias = _block_bias(selection, tile, num_blocks)  # [Hkv, t, blocks + 1]
        nothing = bias.amax(-1).t().isinf()  # [t, Hkv]
        bias = bias.repeat_interleave(page, dim=2)[..., :length]
        bias[..., tile.first :] += bias.new_full((tile.size, tile.size), -torch.inf).triu_(1)
        out[tile.tokens] = attend_tile(q[tile.tokens], k[:, :length], v[:, :length], bias[:, None])
        _zero_heads(out[tile.tokens], nothing)


def _block_bias(selection: Tensor, tile: QueryTile, num_blocks: int) -> Tensor:
    """0 where a token chose a block, else −inf [Hkv, t, blocks + 1]; the last column is none."""
    chosen = selection[tile.tokens].transpose(0, 1).long()  # [Hkv, t, n]
    chosen = chosen.masked_fill(chosen < 0, num_blocks)
    bias = torch.full((*chosen.shape[:2], num_blocks + 1), -torch.inf, device=selection.device)
    bias.scatter_(2, chosen, 0.0)[..., num_blocks] = -torch.inf
    return bias


def _zero_heads(out: Tensor, nothing: Tensor) -> None:
    """Zero ``out`` [t, Hq, Dv] where a token chose no block for a KV head: ``nothing`` [t, Hkv]."""
    by_group = out.view(*nothing.shape, -1, out.shape[2])
    by_group.masked_fill_(nothing[..., None, None], 0)


def _attend_union(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    slots: Tensor | None,
    batch: StepBatch,
    tile: QueryTile,
) -> Tensor:
    """Attention of a tile over the union of its tokens' blocks, each KV head with its own."""
    page, num_blocks = kv.k.shape[2], tile.last // kv.k.shape[2] + 1
    bias = _block_bias(selection, tile, num_blocks)  # [Hkv, t, blocks + 1]
    nothing = bias.amax(-1).t().isinf()  # [t, Hkv]
    columns = _union(bias[..., :num_blocks])  # [Hkv, u]
    # A head with fewer blocks than another reads its first one again, unseen.
    blocks = columns.where(columns < num_blocks, columns.amin(1, keepdim=True)).clamp(
        max=num_blocks - 1
    )
    where = _slots_of(blocks, selection, slots, batch, tile)
    k, v = gather_both(kv, where)
    bias = bias.gather(2, columns[:, None].expand(-1, tile.size, -1))
    bias = bias.repeat_interleave(page, dim=2)  # [Hkv, t, u·P]
    _hide_future(bias, columns, tile, page)
    _clear_unwritten(k, v, blocks, int(batch.context_lens[tile.row]), page)
    out = attend_tile(q[tile.tokens], k, v, bias[:, None])
    _zero_heads(out, nothing)
    return out


def _union(bias: Tensor) -> Tensor:
    """Blocks [Hkv, u] that some token of the tile chose, latest first, then fillers.

    Heads with fewer blocks than another are filled up with the number of blocks.
    """
    num_blocks = bias.shape[2]
    taken = bias.amax(1) == 0  # [Hkv, blocks]
    most = max(1, int(taken.sum(1).max()))
    index = torch.arange(num_blocks, device=bias.device)
    blocks = index.masked_fill(~taken, -1).topk(most, dim=1).values
    return blocks.masked_fill_(blocks < 0, num_blocks)


def _slots_of(
    blocks: Tensor, selection: Tensor, slots: Tensor | None, batch: StepBatch, tile: QueryTile
) -> Tensor:
    """Device slots of ``blocks`` [Hkv, u], which the tile's tokens chose."""
    if slots is None:
        return batch.slot_table[tile.row][blocks]
    chosen = selection[tile.tokens].transpose(0, 1).flatten(1).long()  # [Hkv, t·n]
    given = slots[tile.tokens].transpose(0, 1).flatten(1)
    num_blocks = int(torch.max(chosen.max(), blocks.max())) + 1
    table = slots.new_zeros(chosen.shape[0], num_blocks + 1)  # the last column takes the −1
    chosen = chosen.masked_fill(chosen < 0, num_blocks)
    return table.scatter_(1, chosen, given).gather(1, blocks)


def _hide_future(bias: Tensor, columns: Tensor, tile: QueryTile, page: int) -> None:
    """Mask, in ``bias`` [Hkv, t, u·P], the keys after each token; they are in the latest blocks."""
    latest = tile.last // page - tile.first // page + 1
    offsets = torch.arange(page, device=bias.device)
    keys = (columns[:, :latest, None] * page + offsets).flatten(1)  # [Hkv, keys]
    positions = torch.arange(tile.first, tile.last + 1, device=bias.device)
    future = keys[:, None] > positions[:, None]
    bias[..., : keys.shape[1]].masked_fill_(future, -torch.inf)


def _clear_unwritten(k: Tensor, v: Tensor, blocks: Tensor, context_len: int, page: int) -> None:
    """Zero gathered keys and values beyond the context: a masked NaN would still be a NaN."""
    if int(blocks.max() + 1) * page <= context_len:
        return
    keys = (blocks[..., None] * page + torch.arange(page, device=k.device)).flatten(1)
    unwritten = (keys >= context_len)[..., None]
    k.masked_fill_(unwritten, 0)
    v.masked_fill_(unwritten, 0)
