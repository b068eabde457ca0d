"""The running softmax of attention: base-2 exponentials, scale folded into the fp32 exponent.

State of a tile: ``top`` [BM] highest scaled score, ``total`` [BM] sum of exponentials, ``acc``
[BM, Dv] their weighted values. ``top`` starts finite, so that a row with nothing visible stays
free of NaN. A row that takes nothing from a tile keeps its state bit for bit: results do not
depend on which tokens share a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_top(s, scale, top, total):
    """Take raw scores ``s`` [BM, BN] (-inf where hidden) into the sums: p, alpha, top, total."""
    top_new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top_new[:, None])
    alpha = tl.exp2(top - top_new)
    return p, alpha, top_new, total * alpha + tl.sum(p, 1)


@triton.jit
def fold_hits(s, hit, scale, top, total):
    """``fold_top`` for the rows ``hit`` alone: hidden by their exponent, not score by score."""
    top_new = tl.where(hit, tl.maximum(top, tl.max(s, 1) * scale), top)
    p = tl.exp2(s * scale - tl.where(hit, top_new, float("inf"))[:, None])
    alpha = tl.exp2(top - top_new)
    return p, alpha, top_new, total * alpha + tl.sum(p, 1)


@triton.jit
def fold_values(p, v, alpha, acc):
    """Values ``v`` [BN, Dv] weighted by ``p`` [BM, BN], rounded to the cache type."""
    return tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def normalised(total, acc):
    """Output [BM, Dv] of a state; 0 where nothing was visible."""
    return acc * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]


@triton.jit
def log_sum(top, total):
    """log2 of a state's sum of exponentials; 0, so finite, where nothing was visible."""
    seen = total > 0.0
    return tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)
