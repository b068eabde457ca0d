"""How decode kernels divide a row's context among programs, and how they merge what these found.

A split's size follows from the length of its row's context alone, so that a row's bytes do not
depend on its neighbours. It grows with the square root of the length: neither the splits nor the
partial results that are merged become many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_DOUBLINGS = tl.constexpr(6)
_FEW_TOKENS = 2


def fitting_stages(stages: int, tile_bytes: int) -> int:
    """At most ``stages``, and at most what shared memory (227 KB on Hopper) holds of such tiles."""
    return max(1, min(stages, (200 << 10) // tile_bytes))


def split_size(length: int, smallest: int, spread: int) -> int:
    """``smallest``, doubled until its square is at least ``spread`` · ``length``, 6 times at most.

    Twin of ``size_of_split``.
    """
    size = smallest
    while size * size < spread * length and size < smallest << _DOUBLINGS.value:
        size *= 2
    return size


def max_splits(longest: int, smallest: int, spread: int) -> int:
    """The most splits of any row that is at most ``longest`` long."""
    most, size = 1, smallest
    while True:
        last = size * size // spread  # the length up to which this size serves
        final = size >= smallest << _DOUBLINGS.value or last >= longest
        most = max(most, triton.cdiv(longest if final else last, size))
        if final:
            return most
        size *= 2


@triton.jit
def overlap_launches():
    """Wait for the launches before, and let the next one be set up while this one still runs.

    For kernels launched with ``launch_pdl``: every one of a chain waits first, so that whatever an
    earlier launch wrote is there.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def overlaps_launches(tokens: int, device: torch.device) -> bool:
    """Whether the launches of a decode step of ``tokens`` overlap (sm_90 on).

    Few tokens are bound by latency. With many, programs that wait take room from those that work.
    """
    if tokens > _FEW_TOKENS or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def load_rows(cache_ptr, at, dims, D: tl.constexpr, D_PAD: tl.constexpr):
    """[rows, D_PAD] of a cache, at ``at`` [rows]: every row named is a written one."""
    where = at[:, None] + dims[None, :]
    if D == D_PAD:
        return tl.load(cache_ptr + where)
    return tl.load(cache_ptr + where, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def size_of_split(length, SMALLEST: tl.constexpr, SPREAD: tl.constexpr):
    """Size of the splits of rows of ``length``. Twin of ``split_size``."""
    size = length * 0 + SMALLEST
    for _ in tl.static_range(_DOUBLINGS):
        # Not multiplied out: the square of a large split and long contexts exceed 32 bits.
        size = tl.where(size * size // SPREAD < length, size * 2, size)
    return size


@triton.jit
def log_sum(max_ptr, sum_ptr, at, live, num_splits, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """log2 of the softmax denominator of heads at ``at``; 0 where nothing is visible."""
    splits = tl.arange(0, SPLITS_PAD)
    where = at[:, None] * SPLITS + splits[None, :]
    stored = live[:, None] & (splits < num_splits)[None, :]
    top = tl.load(max_ptr + where, mask=stored, other=float("-inf"))
    total = tl.load(sum_ptr + where, mask=stored, other=0.0)
    highest = tl.max(top, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    denominator = tl.sum(total * tl.exp2(top - shift[:, None]), 1)
    return tl.where(
        denominator > 0, shift + tl.log2(tl.where(denominator > 0, denominator, 1.0)), 0
    )


@triton.jit
def merged_splits(
    max_ptr,
    sum_ptr,
    acc_ptr,
    at,
    live,
    num_splits,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Normalised output [heads, DV_PAD] fp32 of heads at ``at``; 0 where nothing is visible."""
    STEP: tl.constexpr = 8 if SPLITS_PAD >= 8 else SPLITS_PAD
    log_total = log_sum(max_ptr, sum_ptr, at, live, num_splits, SPLITS, SPLITS_PAD)
    dv = tl.arange(0, DV_PAD)
    out = tl.zeros([at.shape[0], DV_PAD], tl.float32)
    for first in range(0, num_splits, STEP):
        splits = first + tl.arange(0, STEP)
        stored = live[:, None] & (splits < num_splits)[None, :]
        where = at[:, None] * SPLITS + splits[None, :]
        top = tl.load(max_ptr + where, mask=stored, other=float("-inf"))
        weight = tl.exp2(top - log_total[:, None])
        acc = tl.load(
            acc_ptr + where[:, :, None] * DV + dv[None, None, :],
            mask=stored[:, :, None] & (dv < DV)[None, None, :],
            other=0.0,
        )  # [heads, STEP, DV]
        out += tl.sum(acc * weight[:, :, None], 1)
    return out
