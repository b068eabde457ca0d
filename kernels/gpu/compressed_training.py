"""Training passes of the compressed branch: output with LSE and selection, and the gradients.

The backward pass is two kernels, each the owner of what it writes, so that no sum depends on an
order of arrival: ``query_gradient`` walks the entries that a tile of queries sees (dQ),
``entry_gradients`` the queries that see a tile of entries (dK, dV).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..contracts import check
from ..shapes import CompressedKV, NSAShape, StepBatch, as_pages
from .compressed_attention import attend_entries
from .entry_backward import entry_gradients
from .entry_gather import gather_entries
from .entry_query_backward import query_gradient
from .score_pass import select_from_entries
from .tuning import Tile, entry_gradient_tile, query_gradient_tile

Tensor = torch.Tensor

# Entries are copied into runs of the longest sequence's length unless that is so many times theirs.
MOST_COPIES = 8


def compressed_with_lse(
    q: Tensor, k_entries: Tensor, v_entries: Tensor, batch: StepBatch, *, nsa: NSAShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, Hq, Dv], log2 of the sum of exponentials [T, Hq] fp32, selection [T, Hkv, n].

    ``q`` [T, Hq, Dk] of whole sequences; ``k_entries`` [T/d, Hkv, Dk] and ``v_entries`` by packed
    slot. Tokens that see no entry get an output of 0. Raises ``ContractError`` for what tensor
    descriptors cannot read.
    """
    _check(q, k_entries, v_entries, nsa)
    pages = CompressedKV(*(as_pages(x, nsa.entries_per_page) for x in (k_entries, v_entries)))
    copied = batch.num_rows * batch.max_context_len
    paged = copied > MOST_COPIES * batch.num_tokens
    entries = gather_entries(pages, batch, nsa=nsa, paged=paged)
    out, lse = attend_entries(q, entries, batch, nsa=nsa, with_output=True)
    assert out is not None
    sparse = batch.max_context_len > nsa.dense_len
    selection = select_from_entries(q, entries, lse if sparse else None, batch, nsa=nsa)
    return out, lse, selection


def compressed_backward(
    q: Tensor,
    k_entries: Tensor,
    v_entries: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    query_tile: Tile | None = None,
    entry_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q`` and of the entries, in their types; 0 at slots that are no entries.

    ``out`` and ``lse`` are ``compressed_with_lse``'s, ``d_out`` [T, Hq, Dv] the output's gradient.
    """
    _check(q, k_entries, v_entries, nsa)
    group, width = q.shape[1] // k_entries.shape[1], _width(k_entries, v_entries)
    query_tile = query_tile or query_gradient_tile(group, width)
    entry_tile = _within_pages(entry_tile or entry_gradient_tile(group, width), nsa.page)
    q, d_out = _described(q), d_out.contiguous()
    k_entries, v_entries = (_entries_alone(x, batch, nsa) for x in (k_entries, v_entries))
    sums = padded_sums(lse, k_entries.shape[1], entry_tile)
    operands = (q, k_entries, v_entries)
    dq = query_gradient(*operands, out, lse, d_out, sums, batch, nsa=nsa, tile=query_tile)
    dk, dv = entry_gradients(*operands, d_out, sums, batch, nsa=nsa, tile=entry_tile)
    return dq, dk, dv


def _entries_alone(entries: Tensor, batch: StepBatch, nsa: NSAShape) -> Tensor:
    """``entries`` [T/d, Hkv, D], contiguous, and 0 at slots that are none.

    Tiles read past a sequence's end, and a probability of 0 times a NaN would be a NaN.
    """
    spared = nsa.compress_len - nsa.compress_stride
    free = batch.positions[:: nsa.compress_stride] < spared
    return entries.contiguous().masked_fill(free[:, None, None], 0)


def _width(k_entries: Tensor, v_entries: Tensor) -> int:
    """The wider head dimension in 16-bit numbers: wider types take the tiles of wider heads."""
    return max(k_entries.shape[2], v_entries.shape[2]) * k_entries.element_size() // 2


def _within_pages(tile: Tile, page: int) -> Tile:
    """``tile`` with tokens that divide a page, so that its tiles end where sequences do."""
    tokens = math.gcd(tile.tokens, page)
    padded = max(tile.rows // tile.tokens, 16 // tokens)
    return replace(tile, tokens=tokens, rows=tokens * padded)


def padded_sums(lse: Tensor, num_kv_heads: int, tile: Tile) -> Tensor:
    """[2, Hkv, T, heads] fp32 for LSE and delta, a group's heads padded as ``tile`` reads them.

    Padding heads get an infinite LSE, which makes their probabilities 0.
    """
    padded = tile.rows // tile.tokens
    sums = lse.new_empty(2, num_kv_heads, lse.shape[0], padded)
    if padded > lse.shape[1] // num_kv_heads:
        sums[0], sums[1] = torch.inf, 0
    return sums


def _described(x: Tensor) -> Tensor:
    """``x`` [T, H, D] with strides that a tensor descriptor takes."""
    steps = (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:2]))
    return x if x.stride(2) == 1 and all(step % 16 == 0 for step in steps) else x.contiguous()


def _check(q: Tensor, k_entries: Tensor, v_entries: Tensor, nsa: NSAShape) -> None:
    check(k_entries.shape[:2] == v_entries.shape[:2], "k and v differ", k=k_entries, v=v_entries)
    check(q.shape[2] == k_entries.shape[2], "q and keys differ in Dk", q=q, k=k_entries)
    check(q.shape[1] % k_entries.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=k_entries)
    slots = q.shape[0] // nsa.compress_stride
    check(k_entries.shape[0] == slots, "entries are not one per d tokens", q=q, k=k_entries)
    check(q.dtype == k_entries.dtype == v_entries.dtype, "types differ", q=q, k=k_entries)
    for x in (k_entries, v_entries):
        whole = x.shape[2] * x.element_size() % 16 == 0
        check(whole, "a head's entry must be a multiple of 16 bytes", entries=x)
