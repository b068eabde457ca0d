"""Attention over compressed entries, and from the same scores the selected blocks."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..contracts import check
from ..shapes import CompressedKV, NSAShape, StepBatch, check_ranked
from .paged import QueryTile, check_queries, gather_pages, long_rows, short_tokens
from .select_blocks import (
    every_block,
    first_blocks,
    select_blocks,
    select_for_one,
    spread_over_blocks,
)

Tensor = torch.Tensor

# Scores that one pass may hold. Passes get smaller as contexts grow, so scratch doesn't.
_SCORE_BUDGET = 1 << 19


def compressed_attention(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    with_output: bool = True,
    ranked: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Attention of ``q`` [T, Hq, Dk] over visible entries, and the blocks it selects.

    Returns the output [T, Hq, Dv], exactly 0 where no entry is visible, or None unless
    ``with_output``; and the selection [T, Hkv, n] int32, ascending, −1 padded (paper, equations
    7-12). Scores, scaled by 1/√Dk, and softmax are fp32. Tokens with t + 1 ≤ n·P select every
    block; where all tokens are so and no output is wanted, scores aren't computed. In a short step
    ``ranked`` [T, Hkv, m] int32, m ≥ n, is filled in the selection's form with the m best blocks.
    """
    check_queries(q, compressed, batch)
    check(
        compressed.k.shape[2] == nsa.entries_per_page,
        "the cache has another number of entries per page",
        k=compressed.k,
        nsa=nsa,
    )
    heads = compressed.k.shape[1]
    if ranked is not None:
        check_ranked(ranked, heads, batch, nsa)
    if batch.max_context_len <= nsa.dense_len and not with_output:
        _choose(None, batch.positions, heads, nsa, ranked)
        return None, every_block(batch, heads, nsa)
    if batch.uniform or (q.shape[0] == 1 and int(batch.positions[0]) >= 0):
        return _one_by_one(q, compressed, batch, nsa, with_output, ranked)
    return _in_passes(q, compressed, batch, nsa, with_output, ranked)


def _in_passes(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    nsa: NSAShape,
    with_output: bool,
    ranked: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Tokens of short rows by so many at a time, then each long row."""
    tokens, heads = short_tokens(batch), compressed.k.shape[1]
    step = _tokens_per_pass(q, batch.max_context_len, nsa)
    if tokens is None and q.shape[0] <= step:
        attended, scores = _by_token(
            q, compressed, batch, batch.positions, batch.token_rows, nsa, with_output
        )
        return attended, _choose(scores, batch.positions, heads, nsa, ranked)
    out = q.new_zeros(q.shape[0], q.shape[1], compressed.v.shape[3]) if with_output else None
    selection = first_blocks(batch.positions, heads, nsa)
    if tokens is None:
        tokens = torch.arange(q.shape[0], device=q.device)
    for start in range(0, tokens.shape[0], step):
        part = tokens[start : start + step]
        positions, rows = batch.positions[part], batch.token_rows[part]
        attended, scores = _by_token(q[part], compressed, batch, positions, rows, nsa, with_output)
        # Ranked are short steps, in which the passes are over all tokens.
        best = None if ranked is None else ranked[start : start + step]
        selection[part] = _choose(scores, positions, heads, nsa, best)
        if out is not None and attended is not None:
            out[part] = attended
    for row in long_rows(batch):
        _attend_row(q, compressed, batch, row, out, selection, nsa)
    return out, selection


def _choose(
    scores: Tensor | None,
    positions: Tensor,
    num_kv_heads: int,
    nsa: NSAShape,
    ranked: Tensor | None = None,
) -> Tensor:
    """The selection [t, Hkv, n] by ``scores`` [t, Hkv, NB]; ``ranked`` [t, Hkv, m] is filled.

    There are no scores where no token has more than n blocks.
    """
    if ranked is not None:
        wide = replace(nsa, num_selected=ranked.shape[2])
        ranked.copy_(_choose(scores, positions, num_kv_heads, wide))
    if scores is None:
        return first_blocks(positions, num_kv_heads, nsa)
    if scores.shape[0] == 1:
        return select_for_one(scores[0], int(positions[0]), nsa)[None]
    return select_blocks(scores, positions, nsa=nsa)


def _tokens_per_pass(q: Tensor, context_len: int, nsa: NSAShape) -> int:
    entries = max(1, nsa.num_visible(context_len - 1))
    return max(1, _SCORE_BUDGET // (q.shape[1] * entries))


def _num_visible(positions: Tensor, nsa: NSAShape) -> Tensor:
    ends = positions + 1 - nsa.compress_len
    return (ends // nsa.compress_stride + 1).clamp(min=0)  # floor division: 0 below l tokens


def _one_by_one(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    nsa: NSAShape,
    with_output: bool,
    ranked: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Each token by itself, so that its sums depend on its own context alone."""
    outs, selections = [], []
    for token in range(q.shape[0]):
        out, scores = _lone_token(q, compressed, batch, token, nsa, with_output)
        own = slice(token, token + 1)
        best = None if ranked is None else ranked[own]
        selections.append(_choose(scores, batch.positions[own], compressed.k.shape[1], nsa, best))
        if out is not None:
            outs.append(out)
    return _stacked(outs) if with_output else None, _stacked(selections)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _lone_token(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    token: int,
    nsa: NSAShape,
    with_output: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Output [1, Hq, Dv] and block scores [1, Hkv, NB], if it has more than n, of one token.

    What it sees is a plain slice, without masks.
    """
    position, row = int(batch.positions[token]), int(batch.token_rows[token])
    if position < nsa.dense_len and not with_output:
        return None, None
    visible = nsa.num_visible(position)
    blocks = batch.block_table[row, None, : position // nsa.page + 1]
    entries = slice(nsa.overlap - 1, nsa.overlap - 1 + visible)
    k = gather_pages(compressed.k, blocks).float()  # [Hkv, m·P/d, Dk]
    queries = q[token].float().reshape(k.shape[0], -1, q.shape[2])  # [Hkv, G, Dk]
    scores = torch.bmm(queries, k.transpose(1, 2))[..., entries]
    p = (scores * q.shape[2] ** -0.5).softmax(-1)
    out = None
    if with_output:
        v = gather_pages(compressed.v, blocks)[:, entries].float()
        out = torch.bmm(p, v).view(1, q.shape[1], -1).to(q.dtype)
    if position < nsa.dense_len:
        return out, None
    return out, spread_over_blocks(p.sum(1), nsa)[None]


def _by_token(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    positions: Tensor,
    rows: Tensor,
    nsa: NSAShape,
    with_output: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Output and block scores of tokens ``q`` [t, Hq, Dk], each over its own row's entries.

    Scores are [t, Hkv, NB], or None where no context has more than n blocks.
    """
    num_pages = -(-batch.max_context_len // nsa.page)
    blocks = batch.block_table[rows.long(), None, :num_pages]  # [t, 1, m]
    k = gather_pages(compressed.k, blocks).float()  # [t, Hkv, m·P/d, Dk]
    queries = q.float().reshape(-1, q.shape[1] // k.shape[1], q.shape[2])  # [t·Hkv, G, Dk]
    # The first slots of the first page belong to no entry.
    scores = torch.bmm(queries, k.flatten(0, 1).transpose(1, 2))[..., nsa.overlap - 1 :]
    index = torch.arange(scores.shape[2], device=q.device)
    hidden = index >= _num_visible(positions, nsa)[:, None]  # [t, C]
    scores = scores.view(*k.shape[:2], *scores.shape[1:])  # [t, Hkv, G, C]
    p = _softmax(scores, hidden[:, None, None], q.shape[2])
    out = None
    if with_output:
        v = gather_pages(compressed.v, blocks)[:, :, nsa.overlap - 1 :].float()
        v = v.masked_fill_(hidden[:, None, :, None], 0).flatten(0, 1)
        out = torch.bmm(p.flatten(0, 1), v).view(*q.shape[:2], -1).to(q.dtype)
    if batch.max_context_len <= nsa.dense_len:
        return out, None
    return out, spread_over_blocks(p.sum(2), nsa)


def _attend_row(
    q: Tensor,
    compressed: CompressedKV,
    batch: StepBatch,
    row: QueryTile,
    out: Tensor | None,
    selection: Tensor,
    nsa: NSAShape,
) -> None:
    """The tokens of a row that need scores, in passes, over the row's entries gathered once."""
    num_visible = nsa.num_visible(row.last)
    needless = max(0, nsa.compress_len - 1 if out is not None else nsa.dense_len) - row.first
    if num_visible == 0 or needless >= row.size:
        return
    skipped = max(0, needless)
    part = QueryTile(row.row, row.start + skipped, row.stop, row.first + skipped)
    blocks = batch.block_table[row.row, None, : -(-(row.last + 1) // nsa.page)]
    entries = slice(nsa.overlap - 1, nsa.overlap - 1 + num_visible)
    k = gather_pages(compressed.k, blocks)[:, entries].float()
    v = None if out is None else gather_pages(compressed.v, blocks)[:, entries].float()
    for tile in part.split(_tokens_per_pass(q, row.last + 1, nsa)):
        visible = nsa.num_visible(tile.last)
        p = _tile_softmax(q[tile.tokens], k[:, :visible], tile, nsa)  # [Hkv, G, t, C]
        if out is not None and v is not None:
            attended = p.flatten(1, 2) @ v[:, :visible]
            attended = torch.unflatten(attended, 1, (-1, tile.size)).permute(2, 0, 1, 3)
            out[tile.tokens] = attended.flatten(1, 2).to(out.dtype)
        if tile.last >= nsa.dense_len:
            scores = spread_over_blocks(p.sum(1).transpose(0, 1), nsa)
            positions = batch.positions[tile.tokens]
            selection[tile.tokens] = select_blocks(scores, positions, nsa=nsa)


def _tile_softmax(q: Tensor, k: Tensor, tile: QueryTile, nsa: NSAShape) -> Tensor:
    """Softmax [Hkv, G, t, C] of ``q`` [t, Hq, Dk] over visible entries of ``k`` [Hkv, C, Dk]."""
    queries = torch.unflatten(q.float(), 1, (k.shape[0], -1)).permute(1, 2, 0, 3)
    scores = queries.flatten(1, 2) @ k.transpose(1, 2)
    scores = torch.unflatten(scores, 1, (-1, tile.size))
    # Entries that the first token sees are visible to all.
    first = nsa.num_visible(tile.first)
    positions = torch.arange(tile.first, tile.last + 1, device=q.device)
    index = torch.arange(first, k.shape[1], device=q.device)
    hidden = index >= _num_visible(positions, nsa)[:, None]
    return _softmax(scores, hidden, q.shape[2], first)


def _softmax(scores: Tensor, hidden: Tensor, width: int, first: int = 0) -> Tensor:
    """fp32 softmax of scaled scores [..., C] but for ``hidden`` ones, given from ``first`` on.

    Rows with every score hidden give 0.
    """
    scores.mul_(width**-0.5)
    scores[..., first:].masked_fill_(hidden, -torch.inf)
    p = scores.softmax(-1)
    if first == 0:
        p.masked_fill_(hidden.all(-1, keepdim=True), 0)
    return p
