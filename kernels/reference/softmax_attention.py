"""Attention over gathered keys: of a token over its own pages, and of a tile over shared keys.

Tiles are computed in fp32, whatever the storage type: on CPUs without bf16 matrix units that is
faster too. One token's attention is bound by reads, and reads keys and values as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch.nn import functional as F

from ..shapes import PagedKV
from .paged import gather_both

Tensor = torch.Tensor


def attend_tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of ``q`` [t, Hq, Dk] over ``k`` [Hkv, L, Dk] and ``v`` [Hkv, L, Dv]: [t, Hq, Dv].

    ``bias`` fp32, 0 or −inf, broadcasts to [Hkv, 1, t, L]. Without one, t tokens and t keys are
    the start of a request and attention is causal, or one token sees every key.
    """
    tokens, heads, dim = q.shape
    num_kv_heads = k.shape[0]
    group = heads // num_kv_heads
    if tokens == 1 and bias is None:
        queries = q.to(k.dtype).reshape(1, num_kv_heads, group, dim)
        out = F.scaled_dot_product_attention(queries, k[None], v[None])
        return out.reshape(1, heads, -1).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.float().reshape(tokens, num_kv_heads, group, dim).permute(1, 2, 0, 3),
        k.float()[:, None].expand(-1, group, -1, -1),
        v.float()[:, None].expand(-1, group, -1, -1),
        attn_mask=bias,
        is_causal=bias is None,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, -1).to(q.dtype)


def causal_bias(queries: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """0 where the query at a position sees the key at one, −inf elsewhere: fp32 [queries, keys]."""
    bias = torch.full((len(queries), len(keys)), -torch.inf, device=device)
    ahead = queries.start - keys.start
    bias.triu_(ahead + 1)
    if window is not None:
        bias += torch.full_like(bias, -torch.inf).tril_(ahead - window)
    return bias


@dataclass(frozen=True, slots=True)
class PageRead:
    """What one token reads: the pages that hold its keys, and which of the gathered keys it sees.

    ``keys`` None: the heads see different keys, so ``pages`` [1, Hkv or 1, m], the token's
    ``position`` [1] and ``first_key`` [1] say what is masked.
    """

    slots: Tensor  # [Hkv or 1, m], or [1, Hkv or 1, m] where keys is None
    keys: slice | None
    pages: Tensor
    position: Tensor
    first_key: Tensor | None


def page_reads(
    pages: Tensor, slots: Tensor, positions: Tensor, first_keys: Tensor | None, page: int
) -> tuple[PageRead, ...]:
    """What each of t tokens reads of its own ``pages`` [t, Hkv or 1, m], for ``attend_pages``.

    ``pages`` are page indices within the request, ascending, then −1, and ``slots`` of the same
    shape say where they are. Keys after the token's own position [t] are not seen, nor those
    before ``first_keys`` [t].
    """
    reads = []
    for token, run in enumerate(_visible_runs(pages, positions, first_keys, page)):
        own = slice(token, token + 1)
        where = slots[own] if run is None else slots[token, :, : -(-run.stop // page)]
        keys = None if run is None else slice(run.start, run.stop)
        first_key = None if first_keys is None else first_keys[own]
        reads.append(PageRead(where, keys, pages[own], positions[own], first_key))
    return tuple(reads)


def attend_pages(q: Tensor, kv: PagedKV, reads: Sequence[PageRead]) -> Tensor:
    """Attention of each token of ``q`` [t, Hq, Dk] over what it reads: [t, Hq, Dv].

    A token without keys, such as padding, gets 0. Token by token, because what one token reads
    fits the CPU's cache and needs no mask: several times as fast as one masked pass over all.
    """
    attended = [_attend_read(q[at : at + 1], kv, read) for at, read in enumerate(reads)]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attend_read(q: Tensor, kv: PagedKV, read: PageRead) -> Tensor:
    if read.keys is None:
        return _attend_masked(q, kv, read)
    if read.keys.stop == 0:
        return q.new_zeros(1, q.shape[1], kv.v.shape[3])
    k, v = gather_both(kv, read.slots)
    return attend_tile(q, k[:, read.keys], v[:, read.keys], None)


def _visible_runs(
    pages: Tensor, positions: Tensor, first_keys: Tensor | None, page: int
) -> Iterator[range | None]:
    """Which of its gathered keys each token sees, if that is one run, the same for every head."""
    firsts = repeat(0) if first_keys is None else first_keys.tolist()
    for position, first, lists in zip(positions.tolist(), firsts, pages.tolist(), strict=False):
        current = position // page
        end = lists[0].index(current) if current in lists[0] else 0
        if position < 0:
            yield range(0)
        elif all(chosen[end] == current for chosen in lists):
            skipped = max(0, first - lists[0][0] * page)
            yield range(skipped, end * page + position % page + 1)
        else:
            yield None


def _attend_masked(q: Tensor, kv: PagedKV, read: PageRead) -> Tensor:
    pages, positions, first_keys = read.pages, read.position, read.first_key
    tokens, heads, dim = q.shape
    num_kv_heads, page = kv.k.shape[1:3]
    keys = pages[..., None] * page + torch.arange(page, device=q.device)
    hidden = (keys > positions[:, None, None, None]) | (pages < 0)[..., None]
    if first_keys is not None:
        hidden |= keys < first_keys[:, None, None, None]
    hidden = hidden.flatten(2)  # [t, Hkv or 1, m·P]
    k, v = gather_both(kv, read.slots)
    # Masked keys too: a bias of −inf does not hide the NaN of unwritten memory.
    k = k.float().masked_fill_(hidden[..., None], 0)
    v = v.float().masked_fill_(hidden[..., None], 0)
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    out = F.scaled_dot_product_attention(
        q.float().reshape(tokens, num_kv_heads, heads // num_kv_heads, dim),
        k,
        v,
        attn_mask=bias[:, :, None],
    )
    out.masked_fill_(hidden.all(-1)[..., None, None], 0)
    return out.reshape(tokens, heads, -1).to(q.dtype)
