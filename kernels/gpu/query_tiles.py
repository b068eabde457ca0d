"""Query tiles of a ragged step: which row and which tokens a program serves.

Row r owns the tile numbers from ``cu_seqlens_q[r] // BT + r`` up to the next row's first one. That
is never fewer than it needs, so the grid follows from T and B alone and nothing is read back; the
spare tiles find no token and leave. Tokens past the last row (padding) form a row of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl


def num_query_tiles(num_tokens: int, num_rows: int, tile_tokens: int) -> int:
    """Tile numbers in use for ``num_tokens`` in ``num_rows`` rows and the padding row."""
    return num_tokens // tile_tokens + num_rows + 1


@triton.jit
def locate_tile(cu_ptr, tile, num_rows, num_tokens, BT: tl.constexpr):
    """Row of ``tile``, its first token, and the end of the row (tile empty: first >= end)."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high + 1) // 2
        inside = tl.load(cu_ptr + middle) // BT + middle <= tile
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    begin = tl.load(cu_ptr + low)
    end = tl.load(cu_ptr + low + 1, mask=low < num_rows, other=num_tokens)
    return low, begin + (tile - begin // BT - low) * BT, end


@triton.jit
def num_visible(positions, L: tl.constexpr, STRIDE: tl.constexpr):
    """Compressed entries that the query at each position sees; 0 at padding (-1)."""
    # Guarded: division truncates toward zero and would give 1 for L - STRIDE < t + 1 < L.
    return tl.where(positions + 1 < L, 0, (positions + 1 - L) // STRIDE + 1)
