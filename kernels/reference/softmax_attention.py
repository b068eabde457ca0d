"""Attention over gathered keys: of a token over its own pages, and of a tile over shared keys.

Everything is computed in fp32, whatever the storage type: on CPUs without bf16 matrix units that
is faster too.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..shapes import PagedKV
from .paged import gather_pages

Tensor = torch.Tensor

# Elements of gathered keys that one pass of attention token by token may hold.
_GATHER_BUDGET = 1 << 22


def attend_tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of ``q`` [t, Hq, Dk] over ``k`` [Hkv, L, Dk] and ``v`` [Hkv, L, Dv]: [t, Hq, Dv].

    ``bias`` fp32, 0 or −inf, broadcasts to [Hkv, 1, t, L]. Without one, t tokens and t keys are
    the start of a request and attention is causal, or one token sees every key.
    """
    tokens, heads, dim = q.shape
    num_kv_heads = k.shape[0]
    group = heads // num_kv_heads
    out = F.scaled_dot_product_attention(
        q.float().reshape(tokens, num_kv_heads, group, dim).permute(1, 2, 0, 3),
        k.float()[:, None].expand(-1, group, -1, -1),
        v.float()[:, None].expand(-1, group, -1, -1),
        attn_mask=bias,
        is_causal=bias is None and tokens > 1,
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


def attend_pages(
    q: Tensor,
    kv: PagedKV,
    pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    first_keys: Tensor | None = None,
) -> Tensor:
    """Attention of each token of ``q`` [t, Hq, Dk] over its own pages: [t, Hq, Dv].

    ``pages`` [t, Hkv or 1, m] are page indices within the request, ascending, then −1, and
    ``slots`` of the same shape say where they are. Keys after the token's own position [t] are
    masked, and those before ``first_keys`` [t]. A token without keys, such as padding, gets 0.
    """
    if q.shape[0] == 1 and (run := _visible_run(pages, positions, first_keys, kv.k.shape[2])):
        slots = slots[0, :, : -(-run.stop // kv.k.shape[2])]
        keys = slice(run.start, run.stop)
        return attend_tile(
            q, gather_pages(kv.k, slots)[:, keys], gather_pages(kv.v, slots)[:, keys], None
        )
    step = max(1, _GATHER_BUDGET // (kv.k[0].numel() * max(1, slots.shape[2])))
    out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        first = None if first_keys is None else first_keys[part]
        out[part] = _attend_masked(q[part], kv, pages[part], slots[part], positions[part], first)
    return out


def _visible_run(
    pages: Tensor, positions: Tensor, first_keys: Tensor | None, page: int
) -> range | None:
    """Which of its gathered keys a lone token sees, if that is one run, the same for every head."""
    position, lists = int(positions[0]), pages[0].tolist()
    current = position // page
    if position < 0 or current not in lists[0]:
        return None
    end = lists[0].index(current)
    if any(chosen[end] != current for chosen in lists):
        return None
    first = 0 if first_keys is None else int(first_keys[0]) - lists[0][0] * page
    return range(max(first, 0), end * page + position % page + 1)


def _attend_masked(
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
    hidden = (keys > positions[:, None, None, None]) | (pages < 0)[..., None]
    if first_keys is not None:
        hidden |= keys < first_keys[:, None, None, None]
    hidden = hidden.flatten(2)  # [t, Hkv or 1, m·P]
    # Masked keys too: −inf does not hide the NaN of unwritten memory.
    k = gather_pages(kv.k, slots).float().masked_fill_(hidden[..., None], 0)
    v = gather_pages(kv.v, slots).float().masked_fill_(hidden[..., None], 0)
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    out = F.scaled_dot_product_attention(
        q.float().reshape(tokens, num_kv_heads, heads // num_kv_heads, dim),
        k,
        v,
        attn_mask=bias[:, :, None],
    )
    out.masked_fill_(hidden.all(-1)[..., None, None], 0)
    return out.reshape(tokens, heads, -1).to(q.dtype)
