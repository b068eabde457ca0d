"""What the attention branches share: gathering pages, and attention over a token's own pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from ..contracts import check
from ..shapes import PagedKV, StepBatch

Tensor = torch.Tensor

# Rows of up to this many tokens are attended token by token, longer ones in query tiles.
_SHORT_ROW = 8
# Elements of gathered keys that one pass of token-by-token attention may hold.
_GATHER_BUDGET = 1 << 22


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Neighbouring tokens start … stop − 1 of one row, at positions first … last."""

    row: int
    start: int
    stop: int
    first: int

    @property
    def last(self) -> int:
        return self.first + self.stop - self.start - 1


def check_queries(q: Tensor, kv: PagedKV, batch: StepBatch) -> None:
    """Raise ``ContractError`` unless ``q`` [T, Hq, Dk] fits the cache and the batch."""
    check(q.ndim == 3 and q.shape[0] == batch.num_tokens, "q is not [T, Hq, Dk]", q=q)
    check(q.shape[2] == kv.k.shape[3], "q and the cached keys differ in dimension", q=q, k=kv.k)
    check(q.shape[1] % kv.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=kv.k)


def short_tokens(batch: StepBatch) -> Tensor | None:
    """Indices [T'] of the tokens to attend one by one; None stands for all of them."""
    if batch.max_query_len <= _SHORT_ROW:
        return None
    short = batch.cu_seqlens_q.diff() <= _SHORT_ROW
    return (short[batch.token_rows.long()] & (batch.positions >= 0)).nonzero()[:, 0]


def query_tiles(batch: StepBatch, size: int) -> Iterator[QueryTile]:
    """Tiles of up to ``size`` tokens of the rows too long for token-by-token attention."""
    if batch.max_query_len <= _SHORT_ROW:
        return
    borders = batch.cu_seqlens_q.tolist()
    for row, (start, stop) in enumerate(pairwise(borders)):
        if stop - start <= _SHORT_ROW:
            continue
        stop = start + int((batch.positions[start:stop] >= 0).sum())
        first = int(batch.positions[start]) - start
        for tile in range(start, stop, size):
            yield QueryTile(row, tile, min(tile + size, stop), first + tile)


def gather_pieces(cache: Tensor, slots: Tensor) -> Tensor:
    """Pages ``slots`` [..., Hkv or 1, m] of ``cache`` [S, Hkv, E, D], as [..., Hkv, m·E, D].

    Each KV head may have its own pages. A slot of −1 yields the bytes of some page; the caller
    masks them.
    """
    _, heads, rows, dim = cache.shape
    by_slot, by_head, by_row, _ = cache.stride()
    piece = rows * dim
    slots = slots.long().clamp(min=0)
    head = torch.arange(heads, device=cache.device)[:, None]
    if by_row != dim or by_slot % piece or by_head % piece or cache.stride(3) != 1:
        return cache[slots, head].flatten(-3, -2)
    # Pieces of one head and page lie whole in memory: seen as rows of a table, they are copied
    # in runs, several times as fast as by element.
    last = (cache.shape[0] - 1) * by_slot + (heads - 1) * by_head
    table = cache.as_strided((last // piece + 1, piece), (piece, 1), cache.storage_offset())
    index = slots * (by_slot // piece) + head * (by_head // piece)
    return table.index_select(0, index.flatten()).view(*index.shape[:-1], -1, dim)


def grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    """``q`` [T, Hq, D] as [Hkv, G, T, D]: the heads of a group beside their KV head."""
    tokens, heads, dim = q.shape
    return q.reshape(tokens, num_kv_heads, heads // num_kv_heads, dim).permute(1, 2, 0, 3)


def attend_tile(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of a query tile ``q`` [t, Hq, Dk] over ``k`` and ``v`` [Hkv, L, D]: [t, Hq, Dv].

    ``visible`` broadcasts to [Hkv, 1, t, L]; None: the tile's tokens are the last t of L keys.
    """
    queries = grouped(q, k.shape[0])
    group = queries.shape[1]
    causal = visible is None
    if causal and q.shape[0] != k.shape[1]:
        visible = _last_rows_causal(q.shape[0], k.shape[1], q.device)
        causal = False
    kind = torch.promote_types(q.dtype, k.dtype)
    out = F.scaled_dot_product_attention(
        queries.to(kind),
        k.to(kind)[:, None].expand(-1, group, -1, -1),
        v.to(kind)[:, None].expand(-1, group, -1, -1),
        attn_mask=visible,
        is_causal=causal,
    )
    return out.permute(2, 0, 1, 3).reshape(q.shape[0], q.shape[1], -1).to(q.dtype)


def _last_rows_causal(queries: int, keys: int, device: torch.device) -> Tensor:
    key = torch.arange(keys, device=device)
    return key <= torch.arange(keys - queries, keys, device=device)[:, None]


def attend_pages(
    q: Tensor,
    kv: PagedKV,
    pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    first_keys: Tensor | None = None,
) -> Tensor:
    """Attention of each token of ``q`` [t, Hq, Dk] over its own pages: [t, Hq, Dv].

    ``pages`` [t, Hkv or 1, m] are page indices within the request, −1 for none, and ``slots`` of
    the same shape say where they are. Keys after the token's own position [t], or before
    ``first_keys`` [t], are masked. Tokens at position −1 get 0.
    """
    per_token = slots.shape[2] * kv.k.shape[1] * kv.k.shape[2] * kv.k.shape[3]
    step = max(1, _GATHER_BUDGET // max(1, per_token))
    if q.shape[0] <= step:
        return _attend_own(q, kv, pages, slots, positions, first_keys)
    out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        first = None if first_keys is None else first_keys[part]
        out[part] = _attend_own(q[part], kv, pages[part], slots[part], positions[part], first)
    return out


def _attend_own(
    q: Tensor,
    kv: PagedKV,
    pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    first_keys: Tensor | None,
) -> Tensor:
    tokens, heads, dim = q.shape
    num_kv_heads, page = kv.k.shape[1:3]
    keys = pages[..., None] * page + torch.arange(page, device=q.device)
    visible = (keys <= positions[:, None, None, None]) & (pages >= 0)[..., None]
    if first_keys is not None:
        visible &= keys >= first_keys[:, None, None, None]
    visible = visible.flatten(2)  # [t, Hkv or 1, m·P]
    # Masked values are multiplied by 0, which leaves the NaN of unwritten memory NaN.
    hidden = ~visible[..., None]
    k = gather_pieces(kv.k, slots).masked_fill_(hidden, 0)
    v = gather_pieces(kv.v, slots).masked_fill_(hidden, 0)
    kind = torch.promote_types(q.dtype, k.dtype)
    out = F.scaled_dot_product_attention(
        q.reshape(tokens, num_kv_heads, heads // num_kv_heads, dim).to(kind),
        k.to(kind),
        v.to(kind),
        attn_mask=visible[:, :, None],
    )
    out = out.masked_fill(~visible.any(-1)[..., None, None], 0)
    return out.reshape(tokens, heads, -1).to(q.dtype)
