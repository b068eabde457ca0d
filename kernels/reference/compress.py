"""φ: how the l tokens of a compressed entry become one key and one value (paper, equation 7)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..contracts import check
from ..shapes import CompressKind, Compressor, Phi
from .norm_rope import rotate
from .uniform import uniform_silu

Tensor = torch.Tensor

# Matrix products round differently with their number of rows. Entries go through φ in tiles of
# this fixed height, so that an entry's bytes don't depend on how a prompt was chunked.
_TILE = 16


def compress(
    k_tokens: Tensor, v_tokens: Tensor, *, first_positions: Tensor, compressor: Compressor
) -> tuple[Tensor, Tensor]:
    """φ of E entries: k [E, Hkv, Dk] and v [E, Hkv, Dv], both fp32.

    ``k_tokens`` [E, Hkv, l, Dk] and ``v_tokens`` [E, Hkv, l, Dv] are the cached tokens of each
    entry, keys rotated; ``first_positions`` [E] is i·d. With φ_k before RoPE the keys are rotated
    back by their own positions first, and the entry is rotated at i·d.
    """
    check(
        k_tokens.ndim == 4 and v_tokens.ndim == 4, "tokens have four axes", k=k_tokens, v=v_tokens
    )
    check(k_tokens.shape[:3] == v_tokens.shape[:3], "k and v differ", k=k_tokens, v=v_tokens)
    k, v = k_tokens.float(), v_tokens.float()
    if compressor.inv_freq is None:
        return _apply(compressor.k, k), _apply(compressor.v, v)
    positions = first_positions[:, None] + torch.arange(k.shape[2], device=k.device)  # [E, l]
    cos, sin = _cos_sin(positions, compressor.inv_freq)
    scale = compressor.rope_scale
    k = rotate(k, (cos / scale)[:, None], (-sin / scale)[:, None])
    entry = _apply(compressor.k, k)
    cos, sin = cos[:, None, 0] * scale, sin[:, None, 0] * scale
    return rotate(entry, cos, sin), _apply(compressor.v, v)


def _cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * inv_freq.float()
    return angles.cos(), angles.sin()


def _apply(phi: Phi, x: Tensor) -> Tensor:
    """φ of fp32 tokens [E, Hkv, l, D] -> [E, Hkv, D]."""
    if phi.position is not None:
        check(phi.position.shape == x.shape[1:], "position embedding is not [Hkv, l, D]", x=x)
        x = x + phi.position.float()
    if phi.kind is CompressKind.MEAN:
        return x.mean(dim=2)
    if phi.kind is CompressKind.WEIGHTED:
        return (x * _needed(phi.weight, phi).float()[..., None]).sum(dim=2)
    product = _in_tiles(phi, x.flatten(2))
    return product if phi.kind is CompressKind.MLP or phi.down is None else x.mean(dim=2) + product


def _in_tiles(phi: Phi, x: Tensor) -> Tensor:
    """Matrix products of entries [E, Hkv, l·D] -> [E, Hkv, D]."""
    entries = x.shape[0]
    x = F.pad(x, (0, 0, 0, 0, 0, -entries % _TILE))
    tiles = [_products(phi, tile.transpose(0, 1)) for tile in torch.split(x, _TILE)]
    return torch.cat(tiles, dim=1).transpose(0, 1)[:entries]


def _products(phi: Phi, x: Tensor) -> Tensor:
    """[Hkv, E, l·D] -> [Hkv, E, D]."""
    if phi.down is None:
        return x @ _needed(phi.weight, phi).float()
    hidden = x @ phi.down.float()
    if phi.kind is CompressKind.MLP:
        hidden = uniform_silu(hidden)
    return hidden @ _needed(phi.up, phi).float()


def _needed(weight: Tensor | None, phi: Phi) -> Tensor:
    check(weight is not None, f"φ of kind {phi.kind} lacks a weight")
    assert weight is not None
    return weight
