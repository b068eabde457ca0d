"""Bytes and flops of each op, from its shapes alone: what a benchmark holds its timings against.

``bytes`` is the traffic no implementation avoids: every input that the op needs is read once, every
output is written once, and keys that several tokens of a row read count once. ``flops`` counts a
multiply-add as two; exponentials and comparisons are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .shapes import NSAShape


@dataclass(frozen=True, slots=True)
class Cost:
    """Compulsory memory traffic and arithmetic of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __iter__(self) -> Iterator[int]:
        return iter((self.bytes, self.flops))


class HeadShape(Protocol):
    """Whatever states the heads of an attention layer under these names."""

    @property
    def num_q_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim_k(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention layer's heads, and the bytes of an element of q, K, V and the output."""

    num_q: int
    num_kv: int
    dim_k: int
    dim_v: int
    element: int = 2

    @property
    def per_key(self) -> int:
        """Bytes of one token's, or one compressed entry's, keys and values."""
        return self.num_kv * (self.dim_k + self.dim_v) * self.element

    @property
    def per_query(self) -> int:
        """Bytes of one token's query and output."""
        return self.num_q * (self.dim_k + self.dim_v) * self.element


@dataclass(frozen=True, slots=True)
class Row:
    """``new`` tokens of a step that end a context of ``context`` tokens."""

    context: int
    new: int

    @property
    def positions(self) -> range:
        return range(self.context - self.new, self.context)


def dense_attention(heads: Heads, rows: Sequence[Row]) -> Cost:
    """Causal attention over whole contexts."""
    return _attention(heads, rows, lambda t: t + 1, lambda row: row.context)


def window_attention(heads: Heads, rows: Sequence[Row], nsa: NSAShape) -> Cost:
    """Attention over the last w tokens of each."""
    return _attention(
        heads,
        rows,
        lambda t: min(t + 1, nsa.window),
        lambda row: _window_distinct(row, nsa),
    )


def selected_attention(heads: Heads, rows: Sequence[Row], nsa: NSAShape) -> Cost:
    """Attention over n blocks of each token; neighbours are taken to choose alike where they can.

    Only the keys up to the token count in its last block.
    """

    cost = _attention(
        heads, rows, lambda t: _selected_keys(t, nsa), lambda row: _selected_distinct(row, nsa)
    )
    lists = sum(row.new for row in rows) * heads.num_kv * nsa.num_selected * 4
    return cost + Cost(lists, 0)


def compressed_attention(
    heads: Heads, rows: Sequence[Row], nsa: NSAShape, *, with_output: bool = True
) -> Cost:
    """Scores over visible entries, their sum over each group, and the output where it is wanted.

    Without an output, tokens with t + 1 ≤ n·P need no scores.
    """
    dim_v = heads.dim_v if with_output else 0
    used = Heads(heads.num_q, heads.num_kv, heads.dim_k, dim_v, heads.element)

    def entries(position: int) -> int:
        needed = with_output or position >= nsa.dense_len
        return nsa.num_visible(position) if needed else 0

    cost = _attention(used, rows, entries, lambda row: entries(row.context - 1))
    lists = sum(row.new for row in rows) * heads.num_kv * nsa.num_selected * 4
    return cost + Cost(lists, 0)


def sparse_attention(heads: Heads, rows: Sequence[Row], nsa: NSAShape) -> Cost:
    """Selected and window attention and the gated sum with the compressed branch's output.

    The forced local blocks are read once for both branches; the chosen ones are taken to lie
    before the window.
    """
    selected, window = selected_attention(heads, rows, nsa), window_attention(heads, rows, nsa)
    twice = 0
    for row in rows:
        local = (nsa.num_local - 1) * nsa.page + (row.context - 1) % nsa.page + 1
        beyond = _selected_distinct(row, nsa) + _window_distinct(row, nsa) - row.context
        twice += row.new * heads.per_query
        twice += max(beyond, min(local, nsa.window, row.context)) * heads.per_key
    branch = sum(row.new for row in rows) * heads.num_q * (heads.dim_v + 3) * heads.element
    return selected + window + Cost(branch - twice, 0)


def prefill(shape: HeadShape, nsa: NSAShape, length: int) -> dict[str, Cost]:
    """Costs of one layer, by op and as a whole, over one prompt, in 16-bit types."""
    return _layer(shape, nsa, [Row(length, length)])


def decode(shape: HeadShape, nsa: NSAShape, num_rows: int, context_len: int) -> dict[str, Cost]:
    """Costs of one layer, by op and as a whole, of a decode step of equal rows, in 16-bit types."""
    return _layer(shape, nsa, [Row(context_len, 1)] * num_rows)


def _layer(shape: HeadShape, nsa: NSAShape, rows: Sequence[Row]) -> dict[str, Cost]:
    heads = Heads(shape.num_q_heads, shape.num_kv_heads, shape.head_dim_k, shape.head_dim_v)
    ops = {
        "kv_write": kv_write(heads, rows, nsa),
        "compressed_attention": compressed_attention(heads, rows, nsa),
        "sparse": sparse_attention(heads, rows, nsa),
    }
    return {**ops, "layer": sum(ops.values(), Cost(0, 0))}


def kv_write(heads: Heads, rows: Sequence[Row], nsa: NSAShape | None) -> Cost:
    """K/V of every token, and the mean of the tokens of every entry that they complete.

    ``nsa`` None: a dense model. Tokens of this step are read once; an entry's older tokens come
    from the cache.
    """
    tokens = sum(row.new for row in rows)
    cost = Cost(2 * tokens * heads.per_key, 0)
    if nsa is None:
        return cost
    for row in rows:
        before = nsa.num_visible(row.context - row.new - 1)
        entries = nsa.num_visible(row.context - 1) - before
        start = row.context - row.new
        older = max(0, start - before * nsa.compress_stride) if entries else 0
        adds = entries * nsa.compress_len * heads.num_kv * (heads.dim_k + heads.dim_v)
        cost += Cost((entries + older) * heads.per_key, adds)
    return cost


def gated_fusion(heads: Heads, num_tokens: int) -> Cost:
    """Three outputs and 3 gates a head in, one output out."""
    outputs = num_tokens * heads.num_q * heads.dim_v
    gates = num_tokens * heads.num_q * 3
    return Cost((4 * outputs + gates) * heads.element, 6 * outputs)


def add_rms_norm(num_tokens: int, width: int, element: int = 2) -> Cost:
    """x and the residual in, their sum and its norm out."""
    values = num_tokens * width
    return Cost((4 * values + width) * element, 5 * values)


def swiglu(num_tokens: int, width: int, element: int = 2) -> Cost:
    """Gate and up [T, 2·I] in, [T, I] out."""
    return Cost(3 * num_tokens * width * element, 2 * num_tokens * width)


def _attention(
    heads: Heads,
    rows: Sequence[Row],
    keys: Callable[[int], int],
    distinct: Callable[[Row], int],
) -> Cost:
    """Attention in which the token at t reads keys(t), and a row distinct(row) of them in all."""
    pairs = sum(keys(t) for row in rows for t in row.positions)
    traffic = sum(row.new * heads.per_query + distinct(row) * heads.per_key for row in rows)
    return Cost(traffic, 2 * pairs * heads.num_q * (heads.dim_k + heads.dim_v))


def _window_distinct(row: Row, nsa: NSAShape) -> int:
    return min(row.context, row.new - 1 + nsa.window)


def _selected_keys(position: int, nsa: NSAShape) -> int:
    whole = min(nsa.num_selected - 1, position // nsa.page)
    return whole * nsa.page + position % nsa.page + 1


def _selected_distinct(row: Row, nsa: NSAShape) -> int:
    return min(row.context, _selected_keys(row.context - 1, nsa) + row.new - 1)
