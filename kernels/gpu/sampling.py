"""Sampling of next tokens: a pass over the logits, or a few where something is truncated; no sort.

The noise is the reference's, hash by hash. What truncation keeps is everything from some value on:
that value is found by bisection between values that occur, which takes a few passes over the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import SamplingTensors

Tensor = torch.Tensor

_CHUNK = 4096
_SEARCH_CHUNK = 8192
_GOLDEN = tl.constexpr(0x9E3779B9)


def sample(logits: Tensor, settings: SamplingTensors) -> Tensor:
    """One token for each row of ``logits`` [B, V] fp32 -> [B] int64.

    Temperature 0 takes the likeliest token, the smallest id on a tie. Otherwise the token is the
    argmax of temperature-scaled logits plus Gumbel noise, over the tokens that truncation keeps.
    Rows without a finite maximum give some id in [0, V).
    """
    check(logits.ndim == 2, "logits have rows and a vocabulary", logits=logits)
    check(len(settings.temperature) == len(logits), "one setting a row", B=len(logits))
    if settings.all_greedy or not len(logits):
        return logits.argmax(-1)
    logits = logits.contiguous()
    top, greedy = logits.max(-1)  # [B]
    floor = _find_floor(logits, top, settings) if settings.any_truncation else top
    drawn = _draw(logits, top, floor, settings)
    return torch.where(settings.temperature > 0, drawn, greedy)


def _find_floor(logits: Tensor, top: Tensor, settings: SamplingTensors) -> Tensor:
    """The least scaled logit [B] that truncation keeps."""
    floor = torch.empty_like(top)
    _floor_kernel[(len(logits),)](
        logits,
        top,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        floor,
        logits.shape[1],
        CHUNK=_SEARCH_CHUNK,
        num_warps=16,
    )
    return floor


def _draw(logits: Tensor, top: Tensor, floor: Tensor, settings: SamplingTensors) -> Tensor:
    num_rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, _CHUNK)
    best = logits.new_empty(num_rows, chunks)
    token_ids = torch.empty_like(best, dtype=torch.int64)
    _draw_kernel[num_rows, chunks](
        logits,
        top,
        floor,
        settings.temperature,
        settings.seeds,
        settings.steps,
        best,
        token_ids,
        vocabulary,
        TRUNCATED=settings.any_truncation,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    return token_ids.gather(1, best.argmax(-1, keepdim=True))[:, 0]


@triton.jit
def _scaled(x, top, temperature):
    """Logits over the temperature, the highest at 0; rounded as the reference's."""
    finite = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    return tl.div_rn(x - finite, tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _mixed(x, key):
    """A permutation of uint32, into which ``key`` enters between its two products."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ key) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _natural_log(x):
    """ln of normal fp32 to about one unit in the last place: the hardware's own is wrong near 1.

    By ln(m · 2^e) = e · ln 2 + 2 artanh(s), s = (m − 1) / (m + 1), m in [√½, √2).
    """
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    # 2 artanh(s) = f − s (f − tail), tail = 2 z (1/3 + z/5 + …), fitted.
    tail = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
    half = 0.5 * f * f
    # ln 2 in two parts, of which the first times an exponent is exact.
    low = s * (half + tail) + exponent * 9.0580006145e-06
    return (low - half) + f + exponent * 6.9313812256e-01


@triton.jit
def _gumbel(seed, step, token_ids):
    """Noise of each token id, a pure function of seed, step and id."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    step = step.to(tl.uint32)
    none = step * 0
    first = _mixed(step ^ _mixed(low ^ _mixed(high, none), none), none)
    inner = _mixed((high + _GOLDEN) ^ _mixed(low + _GOLDEN, none), none)
    second = _mixed((step + _GOLDEN) ^ inner, none)
    bits = _mixed(token_ids.to(tl.uint32) + first, second)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -_natural_log(-_natural_log(uniform))


@triton.jit(do_not_specialize=["vocabulary"])
def _draw_kernel(
    logits_ptr,  # [B, V]
    top_ptr,  # [B]
    floor_ptr,
    temperature_ptr,
    seeds_ptr,
    steps_ptr,
    best_ptr,  # [B, chunks]
    ids_ptr,
    vocabulary,
    TRUNCATED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(
        logits_ptr + row.to(tl.int64) * vocabulary + ids, mask=ids < vocabulary, other=float("-inf")
    )
    x = _scaled(x, tl.load(top_ptr + row), tl.load(temperature_ptr + row))
    noisy = x + _gumbel(tl.load(seeds_ptr + row), tl.load(steps_ptr + row), ids)
    if TRUNCATED:
        noisy = tl.where(x >= tl.load(floor_ptr + row), noisy, float("-inf"))
    best = tl.max(noisy, 0)
    # Of no finite value, the first: some id of the vocabulary.
    first = tl.min(tl.where((noisy == best) & (ids < vocabulary), ids, 0x7FFFFFFF), 0)
    first = tl.where(first == 0x7FFFFFFF, tl.program_id(1) * CHUNK, first)
    at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + at, best)
    tl.store(ids_ptr + at, first.to(tl.int64))


@triton.jit
def _measure(row_ptr, top, temperature, vocabulary, border, floor, WEIGHED: tl.constexpr,
             CHUNK: tl.constexpr):  # fmt: skip
    """Of a row's values: how many exceed ``border``, or what those weigh that reach ``floor`` too;
    the largest that doesn't exceed it, and the least that does."""
    amount = tl.zeros([CHUNK], tl.float64)
    below = tl.full([CHUNK], float("-inf"), tl.float32)
    above = tl.full([CHUNK], float("inf"), tl.float32)
    for first in range(0, vocabulary, CHUNK):
        at = first + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + at, mask=at < vocabulary, other=float("-inf"))
        x = _scaled(x, top, temperature)
        exceeds = x > border
        if WEIGHED:
            weight = tl.where(exceeds & (x >= floor), tl.exp(x), 0.0)
        else:
            weight = exceeds.to(tl.float32)
        amount += weight.to(tl.float64)
        below = tl.maximum(below, tl.where(exceeds, float("-inf"), x))
        above = tl.minimum(above, tl.where(exceeds, x, float("inf")))
    return tl.sum(amount, 0), tl.max(below, 0), tl.min(above, 0)


@triton.jit
def _least_kept(row_ptr, top, temperature, vocabulary, low, limit, WEIGHED: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """The least value from ``low`` on such that the larger ones measure less than ``limit``."""
    floor = low
    high = tl.where(low < 0.0, 0.0, low)  # the largest value
    while low < high:
        border = 0.5 * (low + high)
        border = tl.where(border < high, border, low)
        amount, below, above = _measure(
            row_ptr, top, temperature, vocabulary, border, floor, WEIGHED, CHUNK
        )
        kept = amount < limit
        high = tl.where(kept, tl.maximum(below, low), high)
        low = tl.where(kept, low, above)
    return low


@triton.jit(do_not_specialize=["vocabulary"])
def _floor_kernel(
    logits_ptr,  # [B, V]
    top_ptr,  # [B]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    floor_ptr,  # [B]
    vocabulary,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    top = tl.load(top_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * vocabulary
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    floor = tl.where(min_p > 0, _natural_log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    # A row without a finite maximum, and one that doesn't sample, has nothing to search.
    if (temperature > 0) & (tl.abs(top) < float("inf")):
        kth = top * 0.0 + float("-inf")
        if (top_k > 0) & (top_k < vocabulary):
            kth = _least_kept(
                row_ptr, top, temperature, vocabulary, kth, top_k.to(tl.float64), False, CHUNK
            )
        if top_p < 1.0:
            whole, _, _ = _measure(
                row_ptr, top, temperature, vocabulary, float("-inf"), kth, True, CHUNK
            )
            # Below, a token weighs nothing in fp32, and no p below 1 keeps it.
            low = tl.maximum(kth, -104.0)
            nucleus = _least_kept(
                row_ptr, top, temperature, vocabulary, low, whole * top_p, True, CHUNK
            )
            floor = tl.maximum(floor, nucleus)
        floor = tl.maximum(floor, kth)
    tl.store(floor_ptr + row, floor)
