"""Attention of a tile of tokens over keys that they share.

Tiles are computed in fp32, whatever the storage type: on CPUs without bf16 matrix units that is
faster too.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def attend_tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of ``q`` [t, Hq, Dk] over ``k`` [Hkv, L, Dk] and ``v`` [Hkv, L, Dv]: [t, Hq, Dv].

    ``bias`` fp32, 0 or −inf, broadcasts to [Hkv, 1, t, L]. Without one, the t tokens and the t
    keys are the start of a request and attention is causal.
    """
    tokens, heads, dim = q.shape
    num_kv_heads = k.shape[0]
    group = heads // num_kv_heads
    out = weighted_values(
        q.float().reshape(tokens, num_kv_heads, group, dim).permute(1, 2, 0, 3),
        k.float()[:, None].expand(-1, group, -1, -1),
        v.float()[:, None].expand(-1, group, -1, -1),
        bias,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, -1).to(q.dtype)


def weighted_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√Dk + bias)·v of [..., t, Dk], [..., L, Dk] and [..., L, Dv]: [..., t, Dv].

    ``bias`` broadcasts to [..., t, L]; None: causal attention of L tokens over themselves.
    """
    if q.device.type == "cpu":
        causal = bias is None
        out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        return out
    # Elsewhere in plain products: what a library chooses for a mask there has its own rules of
    # alignment and strides, and this is what its choice is compared with.
    if bias is None:
        bias = causal_bias(range(q.shape[-2]), range(k.shape[-2]), None, q.device)
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    weighted: Tensor = (scores.softmax(-1) @ v.float()).to(q.dtype)
    return weighted


def causal_bias(queries: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """0 where the query at a position sees the key at one, −inf elsewhere: fp32 [queries, keys]."""
    bias = torch.full((len(queries), len(keys)), -torch.inf, device=device)
    ahead = queries.start - keys.start
    bias.triu_(ahead + 1)
    if window is not None:
        bias += torch.full_like(bias, -torch.inf).tril_(ahead - window)
    return bias
