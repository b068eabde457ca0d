"""Frozen tile sizes, chosen by pure functions of shapes; measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass, replace

from triton import next_power_of_2


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share: query tokens, their rows (tokens x heads, padded), keys, resources."""

    tokens: int
    rows: int
    keys: int
    warps: int
    stages: int


def query_tile(
    group: int, rows: int, *, keys: int, warps: int, stages: int, most: int = 64
) -> Tile:
    """As many tokens as fit ``rows`` with their ``group`` heads each: from one to ``most``.

    Small groups fill the tile with more tokens instead of padding each token's heads.
    """
    tokens = max(1, min(rows // group, most))
    padded = max(16, next_power_of_2(tokens * group))
    warps = min(warps, max(padded // 16, 1))
    return Tile(tokens=tokens, rows=padded, keys=keys, warps=warps, stages=stages)


def attend_tile(group: int, head_dim: int) -> Tile:
    """Compressed attention with output: accumulator [rows, Dv] stays in registers."""
    if head_dim > 128:
        return query_tile(group, 128, keys=64, warps=8, stages=2)
    return query_tile(group, 128, keys=64, warps=4, stages=2)


def score_tile(group: int, head_dim: int) -> Tile:
    """Block scores: keys are the rows of the product, and whole tokens its columns."""
    padded = next_power_of_2(group)
    tokens = max(1, min(128 // padded, 64))
    warps = 4 if head_dim <= 128 else 8
    return Tile(tokens=tokens, rows=tokens * padded, keys=64, warps=warps, stages=2)


def sparse_tile(group: int, head_dim: int) -> Tile:
    """Selected attention: few tokens, whose selections overlap; a page of keys."""
    return query_tile(group, 64, keys=0, warps=4, stages=3 if head_dim <= 128 else 2, most=16)


def union_warps(width: int) -> int:
    """Warps that list the pages of a tile, of whose selections there are ``width``."""
    return 1 if width <= 128 else 4


def window_tile(group: int, head_dim: int) -> Tile:
    """Window attention: neighbours share nearly all their pages."""
    return query_tile(group, 64, keys=0, warps=4, stages=3 if head_dim <= 128 else 2)


def dense_tile(group: int, head_dim: int) -> Tile:
    """Dense attention over pages that pointers address: eight warps hide the address arithmetic."""
    rows = 256 if head_dim <= 128 else 128
    return query_tile(group, rows, keys=64, warps=8, stages=3 if head_dim <= 128 else 2)


def query_gradient_tile(group: int, head_dim: int) -> Tile:
    """dQ of the compressed branch: the gradient [rows, Dk] stays in registers beside two scores.

    Two programs of four warps share a multiprocessor: one multiplies while one takes exponentials.
    """
    return query_tile(group, 64, keys=64 if head_dim <= 128 else 32, warps=4, stages=2)


def entry_gradient_tile(group: int, head_dim: int) -> Tile:
    """dK and dV of entries, both in registers; a power of two of tokens, whole padded groups."""
    padded = next_power_of_2(group)
    tokens = max(1, 64 // padded)
    warps = 4 if head_dim <= 128 else 8
    return Tile(tokens=tokens, rows=tokens * padded, keys=64, warps=warps, stages=2)


def sparse_gradient_tile(group: int, head_dim: int) -> Tile:
    """dq of selected and window attention: few tokens, whose selections overlap."""
    wide = head_dim > 128
    tile = query_tile(group, 64, keys=0, warps=4, stages=1 if wide else 2, most=16)
    return replace(tile, warps=8 if wide else 4)


def page_gradient_tile(group: int, head_dim: int) -> Tile:
    """dk and dv of a page, whose accumulators stay in registers, from tiles of its readers."""
    wide = head_dim > 128
    tile = query_tile(group, 32 if wide else 64, keys=0, warps=4, stages=1 if wide else 2)
    return replace(tile, warps=8 if wide else 4)
