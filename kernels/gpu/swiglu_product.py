"""The first half of an MLP in one launch: for few rows, bound by reading the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ..contracts import check
from .norm_rope import swiglu

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class SwiGLUTiles:
    """Columns of gate and of up, and steps of K, of one program."""

    columns: int = 64
    steps: int = 128
    warps: int = 4
    stages: int = 3
    # Beyond, cuBLAS and a launch more were as fast on an H200 (I = 14,336, H = 4,096).
    most_tokens: int = 16
    least_programs: int = 128  # fewer leave multiprocessors idle

    def serve(self, tokens: int, weight: Tensor) -> bool:
        """Whether one launch is the faster way."""
        programs = triton.cdiv(weight.shape[0] // 2, self.columns)
        fills = programs >= self.least_programs and weight.shape[1] % self.steps == 0
        return fills and tokens <= self.most_tokens


TILES = SwiGLUTiles()


def swiglu_product(x: Tensor, weight: Tensor, *, tiles: SwiGLUTiles = TILES) -> Tensor:
    """silu(gate) · up [T, I] of the product of ``x`` [T, H] and ``weight`` [2·I, H], gate first.

    Up to ``tiles.most_tokens`` tokens in one launch without rounding in between, and in an order of
    sums that does not depend on how many they are. Raises ``ContractError`` where shapes or types
    do not fit.
    """
    fits = x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    check(fits, "x and weight differ in width or type", x=x, weight=weight)
    check(weight.shape[0] % 2 == 0, "gate and up differ in rows", weight=weight)
    tokens, width = x.shape[0], weight.shape[0] // 2
    if not tiles.serve(tokens, weight):
        return swiglu(F.linear(x, weight))
    check(x.stride(1) == 1 and weight.stride(1) == 1, "rows must be dense", x=x, weight=weight)
    out = x.new_empty(tokens, width)
    if tokens:
        _swiglu_product_kernel[(triton.cdiv(width, tiles.columns),)](
            x, weight, out, tokens, x.stride(0), weight.stride(0),
            I=width, H=x.shape[1], BI=tiles.columns, BH=tiles.steps,
            ROWS=max(16, triton.next_power_of_2(tiles.most_tokens)), STAGES=tiles.stages,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_product_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [2 I, H]
    out_ptr,  # [T, I]
    num_rows,
    x_stride,
    weight_stride,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    BI: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.program_id(0) * BI + tl.arange(0, BI)
    # Columns that do not exist stand for the last that does: loads of the weight need no masks.
    lines = tl.minimum(columns, I - 1).to(tl.int64)
    steps = tl.arange(0, BH)
    gate_at = weight_ptr + lines[:, None] * weight_stride + steps[None, :]
    up_at = gate_at + weight_stride.to(tl.int64) * I
    rows = tl.arange(0, ROWS)
    in_rows = rows < num_rows
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    gate = tl.zeros([BI, ROWS], tl.float32)
    up = tl.zeros([BI, ROWS], tl.float32)
    for at in tl.range(0, H, BH, num_stages=STAGES):
        x = tl.load(x_at + at, mask=in_rows[:, None], other=0.0)
        gate = tl.dot(tl.load(gate_at + at), x.T, gate, input_precision="ieee")
        up = tl.dot(tl.load(up_at + at), x.T, up, input_precision="ieee")
    activated = gate * tl.sigmoid(gate) * up
    to = out_ptr + rows.to(tl.int64)[None, :] * I + columns[:, None]
    inside = (columns < I)[:, None] & in_rows[None, :]
    tl.store(to, activated.to(out_ptr.dtype.element_ty), mask=inside)
