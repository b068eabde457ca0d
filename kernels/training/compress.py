"""φ in training: compressed entries of whole packed sequences, differentiable.

An entry spans l/d strides, and all entries together cover each stride l/d times. So φ is never
applied to copies of its windows: a stride is summed, or multiplied with the weights of all l/d
places that it takes in entries, and each entry adds up what its strides give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..contracts import check
from ..reference.compressed_training import wide_type
from ..shapes import CompressKind, NSAShape, Phi
from .packed import PackedBatch

Tensor = torch.Tensor

# Numbers of hidden layers of ``mlp`` that are held at a time; the backward pass makes them again.
_HIDDEN_BUDGET = 1 << 25


def compress_packed(
    x: Tensor,
    phi: Phi,
    batch: PackedBatch,
    *,
    nsa: NSAShape,
    inv_freq: Tensor | None = None,
    rope_scale: float = 1.0,
) -> Tensor:
    """φ of keys or values ``x`` [T, Hkv, D]: entries [T/d, Hkv, D] by packed slot, in ``x``'s type.

    Slot s covers tokens [(s + 1)·d − l, (s + 1)·d); the first l/d − 1 of a sequence are no entries
    and 0. With ``inv_freq`` φ applies before RoPE: ``x`` is rotated back by its positions, and
    entry i rotated at i·d. Products take ``x``'s type and sum in fp32; all else is fp32 (fp64 for
    fp64). Gradients reach ``x`` and φ's tensors. Source: arXiv 2502.11089, equation 7.
    """
    check(x.ndim == 3 and x.shape[0] == batch.num_tokens, "x is not [T, Hkv, D]", x=x)
    spared = nsa.compress_len - nsa.compress_stride
    first = batch.positions[:: nsa.compress_stride] - spared  # [T/d]; below 0: no entry
    if inv_freq is None:
        entries = _apply(phi, x, nsa)
    else:
        cos, sin = _turns(batch.positions, inv_freq, x)
        raw = _rotate(x, cos / rope_scale, -sin / rope_scale)
        # Sums take the unrounded tokens; products need them in a type that matrix units take.
        entries = _apply(phi, raw if phi.kind is CompressKind.MEAN else raw.to(x.dtype), nsa)
        cos, sin = _turns(first.clamp(min=0), inv_freq, x)
        entries = _rotate(entries, cos * rope_scale, sin * rope_scale)
    return torch.where((first >= 0)[:, None, None], entries, 0).to(x.dtype)


def _turns(positions: Tensor, inv_freq: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [t, 1, Dr/2] at ``positions`` [t]."""
    angles = positions[:, None, None].to(wide_type(x)) * inv_freq.to(wide_type(x))
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first Dr dimensions of ``x`` [t, Hkv, D] rotated, halves paired, in the type of sums."""
    width = 2 * cos.shape[-1]
    low, high, rest = torch.split(
        x.to(wide_type(x)), [width // 2, width // 2, x.shape[-1] - width], dim=-1
    )
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)


def _apply(phi: Phi, x: Tensor, nsa: NSAShape) -> Tensor:
    """φ of ``x`` [T, Hkv, D] at every slot [T/d, Hkv, D], entry or not, in the type of sums."""
    _check(phi, x, nsa)
    position = None if phi.position is None else phi.position.to(wide_type(x))
    if phi.kind is CompressKind.MEAN:
        return _mean(x, position, nsa)
    if phi.kind is CompressKind.WEIGHTED:
        return _weighted(x, _needed(phi.weight, phi), position, nsa)
    if phi.kind is CompressKind.MLP:
        return _mlp(x, _needed(phi.down, phi), _needed(phi.up, phi), position, nsa)
    if phi.down is None:
        return _linear(x, _needed(phi.weight, phi), position, nsa).transpose(0, 1)
    low = _linear(x, phi.down, position, nsa)  # [Hkv, T/d, r]
    product = products(low.to(x.dtype), _needed(phi.up, phi))
    return _mean(x, position, nsa) + product.transpose(0, 1)


def _check(phi: Phi, x: Tensor, nsa: NSAShape) -> None:
    shape = (x.shape[1], nsa.compress_len, x.shape[2])
    fits = phi.position is None or phi.position.shape == shape
    check(fits, "position embedding is not [Hkv, l, D]", position=phi.position, x=x)


def _needed(weight: Tensor | None, phi: Phi) -> Tensor:
    check(weight is not None, f"φ of kind {phi.kind} lacks a weight")
    assert weight is not None
    return weight


def _mean(x: Tensor, position: Tensor | None, nsa: NSAShape) -> Tensor:
    strides = torch.unflatten(x, 0, (-1, nsa.compress_stride)).sum(1, dtype=wide_type(x))
    sums = _from_strides(strides[None, :, None].expand(-1, -1, nsa.overlap, -1, -1), nsa)[0]
    mean: Tensor = sums / nsa.compress_len  # [T/d, Hkv, D]
    return mean if position is None else mean + position.mean(1)


def _weighted(x: Tensor, weight: Tensor, position: Tensor | None, nsa: NSAShape) -> Tensor:
    """``weight`` [Hkv, l]: a product per head with the strides' tokens as its inner dimension."""
    tokens = torch.unflatten(x, 0, (-1, nsa.compress_stride)).permute(
        2, 0, 3, 1
    )  # [Hkv, T/d, D, d]
    places = torch.unflatten(weight, 1, (nsa.overlap, -1)).mT  # [Hkv, d, l/d]
    shares = products(tokens.flatten(1, 2), places).view(*tokens.shape[:3], -1)
    entries = _from_strides(shares.mT, nsa).transpose(0, 1)
    if position is None:
        return entries
    return entries + (position * weight.to(position.dtype)[..., None]).sum(1)


def _linear(x: Tensor, weight: Tensor, position: Tensor | None, nsa: NSAShape) -> Tensor:
    """[Hkv, T/d, N] of ``weight`` [Hkv, l·D, N] or, shared by the heads, [l·D, N]."""
    by_head = weight if weight.ndim == 3 else weight[None]
    places = torch.unflatten(by_head, 1, (nsa.overlap, -1)).transpose(1, 2).flatten(2)
    strides = torch.unflatten(x, 0, (-1, nsa.compress_stride)).permute(2, 0, 1, 3).flatten(2)
    rows = strides if weight.ndim == 3 else strides.flatten(0, 1)[None]  # [·, T/d, d·D]
    shares = products(rows, places).view(*strides.shape[:2], nsa.overlap, -1)
    entries = _from_strides(shares, nsa)
    if position is None:
        return entries
    return entries + position.flatten(1)[:, None] @ by_head.to(position.dtype)


def _mlp(x: Tensor, down: Tensor, up: Tensor, position: Tensor | None, nsa: NSAShape) -> Tensor:
    """Two layers, over some slots at a time: hidden ones are l times as wide as an entry."""
    d, lead = nsa.compress_stride, nsa.overlap - 1
    num_slots = x.shape[0] // d
    size = max(1, _HIDDEN_BUDGET // (x.shape[1] * nsa.overlap * down.shape[1]))
    parts = []
    for slot in range(0, num_slots, size):
        before = min(slot, lead)
        part = x[(slot - before) * d : (slot + size) * d]
        found = checkpoint(_layers, part, down, up, position, nsa, use_reentrant=False)
        parts.append(found[before:])
    return torch.cat(parts)


def _layers(x: Tensor, down: Tensor, up: Tensor, position: Tensor | None, nsa: NSAShape) -> Tensor:
    hidden = F.silu(_linear(x, down, position, nsa))  # [Hkv, T/d, l·D]
    rows = hidden.to(x.dtype).flatten(0, 1)[None]
    return products(rows, up[None])[0].view(*hidden.shape[:2], -1).transpose(0, 1)


def _from_strides(shares: Tensor, nsa: NSAShape) -> Tensor:
    """Slots [·, T/d, ...] from ``shares`` [·, T/d, l/d, ...] of each stride in l/d entries."""
    num_slots, lead = shares.shape[1], nsa.overlap - 1
    places = shares.unbind(2)
    total = places[lead]
    for place in range(lead):
        # Stride s is in this place of slot s + late.
        late = min(lead - place, num_slots)
        edges = [0, 0] * (shares.ndim - 3) + [late, 0]
        total = total + F.pad(places[place][:, : num_slots - late], edges)
    return total


def products(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` [B, R, K] times ``weight`` [B, K, N] in the type of sums, with gradients of both.

    Operands are taken in the type of ``rows``: sums leave the matrix unit unrounded, in fp32 (fp64
    for fp64).
    """
    product: Tensor = _Products.apply(rows, weight)  # type: ignore[no-untyped-call]
    return product


class _Products(torch.autograd.Function):
    """Matrix products whose sums leave the matrix unit unrounded."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _wide_product(rows, weight.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        d_product = d_product.to(rows.dtype)
        d_rows, d_weight = None, None
        if ctx.needs_input_grad[0]:
            d_rows = torch.bmm(d_product, weight.to(rows.dtype).mT)
        if ctx.needs_input_grad[1]:
            d_weight = _wide_product(rows.mT, d_product).to(weight.dtype)
        return d_rows, d_weight


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [B, R, K] times ``b`` [B, K, N] in the type of sums."""
    wide = wide_type(a)
    if a.is_cuda and a.dtype != wide:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))
