"""Matrix products whose rows do not depend on how many there are (``--deterministic``).

A library chooses its kernel by the number of rows, and with it the order of the sums. Here K is
always divided into the same parts, fixed by N and K, each summed in steps of the same length from
its start, and the parts are added in order. Few rows give each part to a program of its own, which
fills the machine; many rows let one program go through all parts. Both compute the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..contracts import check

Tensor = torch.Tensor

_PROGRAMS = 264  # two for each of Hopper's 132 multiprocessors
_LEAST_PART = 512  # of K
_SPLIT_ROWS = 512  # up to this many, parts of K run side by side


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    columns: int
    warps: int
    stages: int


_FEW = _Tile(rows=64, columns=64, warps=4, stages=4)
_MANY = _Tile(rows=128, columns=128, warps=8, stages=4)
_REDUCED = 1024  # elements of a row that one program adds up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [T, K] · ``weight`` [N, K] transposed + ``bias`` [N], as [T, N] in ``x``'s type.

    Sums are fp32, and a row's bytes are the same for every T. Raises ``ContractError`` where
    shapes or types do not fit.
    """
    check(x.ndim == 2 and weight.ndim == 2, "x and weight are matrices", x=x, weight=weight)
    fits = x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    check(fits, "x and weight differ in width or type", x=x, weight=weight)
    check(x.stride(1) == 1 and weight.stride(1) == 1, "rows must be dense", x=x, weight=weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel() == 0:
        return out
    parts = num_parts(*weight.shape)
    if parts == 1 or x.shape[0] > _SPLIT_ROWS:
        _multiply(x, weight, bias, out, parts, beside=False)
        return out
    partial = x.new_empty(parts, *out.shape, dtype=torch.float32)
    _multiply(x, weight, None, partial, parts, beside=True)
    _add_parts(partial, bias, out)
    return out


def num_parts(num_out: int, num_in: int) -> int:
    """Parts of K for a weight [N, K]: enough that few rows keep every multiprocessor busy."""
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(num_out, _FEW.columns))
    return max(1, min(wanted, num_in // _LEAST_PART, 16))


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, parts: int, *, beside: bool
) -> None:
    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    tile = _MANY if num_rows > _SPLIT_ROWS else _FEW
    step = 128 // x.element_size()
    row_tiles, column_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_out, tile.columns)
    _multiply_kernel[row_tiles * column_tiles, parts if beside else 1](
        x,
        weight,
        out if bias is None else bias,
        out,
        num_rows,
        x.stride(0),
        weight.stride(0),
        N=num_out,
        K=num_in,
        PART=triton.cdiv(triton.cdiv(num_in, parts), step) * step,
        PARTS=1 if beside else parts,
        BM=tile.rows,
        BN=tile.columns,
        BK=step,
        BIASED=bias is not None,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _part_sum(
    x_at,
    weight_at,
    in_rows,
    in_columns,
    part,
    K: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The product [BM, BN] over one part of K."""
    begin = part * PART
    end = tl.minimum(begin + PART, K)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(begin, end, BK, num_stages=STAGES):
        inside = (first + tl.arange(0, BK) < end)[None, :]
        x = tl.load(x_at + first, mask=in_rows & inside, other=0.0)
        w = tl.load(weight_at + first, mask=in_columns & inside, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    out_ptr,  # [T, N], or [parts, T, N] fp32
    num_rows,
    x_stride,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,  # that this program goes through
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
):
    # In bands of columns, all rows of a band before the next: neighbours share what they read.
    BAND: tl.constexpr = 8
    row_tiles = tl.cdiv(num_rows, BM)
    band = tl.program_id(0) // (BAND * row_tiles)
    width = tl.minimum((N + BN - 1) // BN - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * row_tiles)
    rows = within // width * BM + tl.arange(0, BM)
    columns = (band * BAND + within % width) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    steps = tl.arange(0, BK)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    weight_at = weight_ptr + columns.to(tl.int64)[:, None] * weight_stride + steps[None, :]
    in_rows = (rows < num_rows)[:, None]
    in_columns = (columns < N)[:, None]
    if PARTS == 1:
        total = _part_sum(x_at, weight_at, in_rows, in_columns, part, K, PART, BM, BN, BK, STAGES)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        for index in range(PARTS):
            total += _part_sum(
                x_at, weight_at, in_rows, in_columns, index, K, PART, BM, BN, BK, STAGES
            )
    if BIASED:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    line = part.to(tl.int64) * num_rows + rows
    to = out_ptr + line[:, None] * N + columns[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=in_rows & (columns < N)[None, :])


def _add_parts(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    num_rows, num_out = out.shape
    _add_kernel[num_rows, triton.cdiv(num_out, _REDUCED)](
        partial,
        out if bias is None else bias,
        out,
        num_rows,
        N=num_out,
        PARTS=partial.shape[0],
        BLOCK=_REDUCED,
        BIASED=bias is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _add_kernel(
    partial_ptr,  # [parts, T, N] fp32
    bias_ptr,
    out_ptr,  # [T, N]
    num_rows,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial_ptr + (part * num_rows + row) * N + columns, mask=inside)
    if BIASED:
        total += tl.load(bias_ptr + columns, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
