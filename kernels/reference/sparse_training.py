"""Selected and window attention with gradients: whole packed sequences, a page of queries a time.

What training keeps of a branch is its output and, for each query head, log2 of its sum of
exponentials (LSE); the backward pass makes probabilities again from that. Sums are in fp32, or
wider where the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..contracts import check
from ..shapes import BranchStats, NSAShape, StepBatch
from .compressed_training import wide_type

Tensor = torch.Tensor

_LN2 = math.log(2)


@dataclass(frozen=True, slots=True)
class _KeyTile:
    """The tokens of one page of queries, and the keys that some of them see."""

    tokens: slice
    keys: Tensor  # [L] int64, each once
    hidden: Tensor  # [Hkv or 1, t, L] bool


def selected_with_lse(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Attention over each token's selected blocks: out [T, Hq, Dv], LSE [T, Hq].

    ``q`` [T, Hq, Dk], ``k`` [T, Hkv, Dk] and ``v`` [T, Hkv, Dv] of a step that is whole sequences
    of whole pages; ``selection`` [T, Hkv, n] as ``select_blocks`` gives it. Last comes what
    ``sparse_backward`` need not find out again: nothing here. Raises ``ContractError`` where shapes
    do not fit.
    """
    _check(q, k, v, selection, batch, nsa)
    out, lse = _attend(q, k, v, _selected_tiles(selection, batch, nsa))
    return out, lse, ()


def window_with_lse(
    q: Tensor, k: Tensor, v: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor]:
    """Attention over each token's last w tokens: as ``selected_with_lse``."""
    _check(q, k, v, None, batch, nsa)
    return _attend(q, k, v, _window_tiles(batch, nsa))


def gate_backward(
    d_out: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    lse_selected: Tensor | None,
    lse_window: Tensor | None,
    gate_logits: Tensor,
    *,
    with_compressed: bool = True,
) -> tuple[Tensor, Tensor | None, BranchStats | None, BranchStats | None]:
    """Through the gated sum of ``outs`` [T, Hq, Dv]: compressed, selected, window.

    Gradients of ``gate_logits`` [T, Hq, 3] and of the compressed branch's output (None unless
    ``with_compressed``), and what the backward passes of the other two need; None where a branch
    has no LSE.
    """
    wide = wide_type(d_out)
    gates = gate_logits.to(wide).sigmoid()
    delta = torch.stack([(d_out.to(wide) * out.to(wide)).sum(-1) for out in outs], -1)
    d_gates = (delta * gates * (1 - gates)).to(gate_logits.dtype)
    d_compressed = (d_out.to(wide) * gates[..., :1]).to(d_out.dtype) if with_compressed else None
    log_gates = F.logsigmoid(gate_logits.to(wide)) / _LN2
    stats = [
        None if lse is None else BranchStats(lse - log_gates[..., at], delta[..., at])
        for at, lse in ((1, lse_selected), (2, lse_window))
    ]
    return d_gates, d_compressed, stats[0], stats[1]


def sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    d_out: Tensor,
    selected: BranchStats | None,
    window: BranchStats | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    listed: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v`` through the branches whose statistics are given.

    ``d_out`` [T, Hq, Dv] is the gradient of the gated sum: gates are in the statistics. ``listed``
    is what ``selected_with_lse`` gave.
    """
    _check(q, k, v, selection, batch, nsa)
    grads = tuple(torch.zeros_like(x, dtype=wide_type(x)) for x in (q, k, v))
    if selected is not None:
        tiles = _selected_tiles(selection, batch, nsa)
        _add_gradients(q, k, v, d_out, selected, tiles, grads)
    if window is not None:
        _add_gradients(q, k, v, d_out, window, _window_tiles(batch, nsa), grads)
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


def _check(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor | None, batch: StepBatch, nsa: NSAShape
) -> None:
    check(q.ndim == 3 and k.ndim == 3 and v.ndim == 3, "q, k and v have three axes", q=q, k=k, v=v)
    check(q.shape[0] == k.shape[0] == v.shape[0], "q, k and v differ in tokens", q=q, k=k, v=v)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(k.shape[1] == v.shape[1], "k and v differ in heads", k=k, v=v)
    check(q.shape[1] % k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=k)
    check(q.shape[2] == k.shape[2], "q and k differ in Dk", q=q, k=k)
    lens = batch.row_lens or ()
    whole = len(lens) > 0 and all(n == c and n % nsa.page == 0 for n, c in lens)
    check(whole, "the step is not whole sequences of whole pages", row_lens=lens, P=nsa.page)
    expected = (q.shape[0], k.shape[1], nsa.num_selected)
    fits = selection is None or selection.shape == expected
    check(fits, "selection is not [T, Hkv, n]", selection=selection)


def _query_pages(batch: StepBatch, page: int) -> Iterator[tuple[int, int]]:
    """(first token of the sequence, first token of the page) of every page."""
    start = 0
    for length, _ in batch.row_lens or ():
        for first in range(start, start + length, page):
            yield start, first
        start += length


def _selected_tiles(selection: Tensor, batch: StepBatch, nsa: NSAShape) -> Iterator[_KeyTile]:
    within = torch.arange(nsa.page, device=selection.device)
    for start, first in _query_pages(batch, nsa.page):
        tokens = slice(first, first + nsa.page)
        chosen = selection[tokens].long()  # [t, Hkv, n]
        blocks: Tensor = torch.unique(chosen[chosen >= 0])
        if blocks.numel() == 0:
            continue
        keys = (start + blocks[:, None] * nsa.page + within).flatten()
        wanted = (chosen[..., None] == blocks).any(2).transpose(0, 1)  # [Hkv, t, m]
        unwanted = ~wanted.repeat_interleave(nsa.page, -1)
        yield _KeyTile(tokens, keys, unwanted | (keys > (first + within)[:, None]))


def _window_tiles(batch: StepBatch, nsa: NSAShape) -> Iterator[_KeyTile]:
    device = batch.positions.device
    for start, first in _query_pages(batch, nsa.page):
        last = first + nsa.page
        keys = torch.arange(max(start, first + 1 - nsa.window), last, device=device)
        at = torch.arange(first, last, device=device)[:, None]
        yield _KeyTile(slice(first, last), keys, ((keys > at) | (keys <= at - nsa.window))[None])


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[t, Hq, ...] in the wide type as [Hkv, G, t, ...]."""
    return torch.unflatten(x.to(wide_type(x)), 1, (num_kv_heads, -1)).movedim(0, 2)


def _by_head(x: Tensor) -> Tensor:
    """[L, Hkv, D] in the wide type as [Hkv, 1, L, D]."""
    return x.to(wide_type(x)).transpose(0, 1)[:, None]


def _scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """Scaled scores [Hkv, G, t, L], −inf where hidden."""
    scores: Tensor = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return scores.masked_fill_(hidden[:, None], -torch.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: Iterator[_KeyTile]) -> tuple[Tensor, Tensor]:
    """Tokens of no tile get 0, and an LSE of 0."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_zeros(q.shape[:2], dtype=wide_type(q))
    for tile in tiles:
        keys, values = _by_head(k[tile.keys]), _by_head(v[tile.keys])
        scores = _scores(_grouped(q[tile.tokens], k.shape[1]), keys, tile.hidden)
        total = scores.logsumexp(-1, keepdim=True)
        total.masked_fill_(total == -torch.inf, 0)
        attended = (scores - total).exp() @ values  # [Hkv, G, t, Dv]
        out[tile.tokens] = attended.movedim(2, 0).flatten(1, 2).to(out.dtype)
        lse[tile.tokens] = total[..., 0].movedim(2, 0).flatten(1, 2) / _LN2
    return out, lse


def _add_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    stats: BranchStats,
    tiles: Iterator[_KeyTile],
    grads: tuple[Tensor, ...],
) -> None:
    dq, dk, dv = grads
    num_kv_heads, scale = k.shape[1], q.shape[2] ** -0.5
    for tile in tiles:
        queries, d_tile = (_grouped(x[tile.tokens], num_kv_heads) for x in (q, d_out))
        lse, delta = (_grouped(x[tile.tokens], num_kv_heads) for x in (stats.lse, stats.delta))
        keys, values = _by_head(k[tile.keys]), _by_head(v[tile.keys])
        p = (_scores(queries, keys, tile.hidden) - lse[..., None] * _LN2).exp()
        d_scores = p * (d_tile @ values.transpose(2, 3) - delta[..., None])
        dq[tile.tokens] += (d_scores @ keys * scale).movedim(2, 0).flatten(1, 2)
        dk[tile.keys] += (d_scores.transpose(2, 3) @ queries * scale).sum(1).transpose(0, 1)
        dv[tile.keys] += (p.transpose(2, 3) @ d_tile).sum(1).transpose(0, 1)
