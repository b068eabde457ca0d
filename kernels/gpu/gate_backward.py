"""Backward of the gated sum: gradients of the gates, and what the branches' own passes need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import BranchStats

Tensor = torch.Tensor

_ROWS = 16
_LOG2E = tl.constexpr(1.4426950408889634)


def gate_backward(
    d_out: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    lse_selected: Tensor | None,
    lse_window: Tensor | None,
    gate_logits: Tensor,
    *,
    with_compressed: bool = True,
) -> tuple[Tensor, Tensor | None, BranchStats | None, BranchStats | None]:
    """Through the gated sum of ``outs`` [T, Hq, Dv]: compressed, selected, window.

    Gradients of ``gate_logits`` [T, Hq, 3] and of the compressed branch's output (None unless
    ``with_compressed``), and what the backward passes of the other two need; None where a branch
    has no LSE.
    """
    check(len({x.shape for x in (d_out, *outs)}) == 1, "branches differ in shape", d_out=d_out)
    wanted = (*d_out.shape[:2], 3)
    check(gate_logits.shape == wanted, "gates are not [T, Hq, 3]", gate_logits=gate_logits)
    d_gates = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    d_compressed = torch.empty_like(d_out) if with_compressed else None
    lses = (lse_selected, lse_window)
    stats = [None if x is None else BranchStats(*(torch.empty_like(x) for _ in "ab")) for x in lses]
    lines = d_out.shape[0] * d_out.shape[1]
    _gate_kernel[(triton.cdiv(lines, _ROWS),)](
        d_out.contiguous(),
        *(out.contiguous() for out in outs),
        gate_logits.contiguous(),
        d_gates,
        d_out if d_compressed is None else d_compressed,
        *_pointers(lse_selected, stats[0], d_gates),
        *_pointers(lse_window, stats[1], d_gates),
        lines,
        DV=d_out.shape[2],
        BLOCK_DV=triton.next_power_of_2(d_out.shape[2]),
        ROWS=_ROWS,
        COMPRESSED=with_compressed,
        SELECTED=lse_selected is not None,
        WINDOWED=lse_window is not None,
        num_warps=4,
    )
    return d_gates, d_compressed, stats[0], stats[1]


def _pointers(lse: Tensor | None, stats: BranchStats | None, unused: Tensor) -> tuple[Tensor, ...]:
    if lse is None or stats is None:
        return (unused, unused, unused)
    return (lse, stats.lse, stats.delta)


@triton.jit
def _load_logit(gates_ptr, line, branch, inside):
    return tl.load(gates_ptr + line * 3 + branch, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _delta(out_ptr, places, mask, d_out):
    """d_out · out of each line [ROWS] fp32."""
    return tl.sum(d_out * tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32), 1)


@triton.jit
def _store_d_gate(d_gates_ptr, line, branch, inside, delta, gate):
    d_gate = delta * gate * (1.0 - gate)
    place = d_gates_ptr + line * 3 + branch
    tl.store(place, d_gate.to(d_gates_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_stats(lse_ptr, gated_lse_ptr, delta_ptr, line, inside, logit, delta):
    """A gate of 0 has a logarithm of -inf: probabilities made from +inf are 0."""
    log_gate = -tl.log2(1.0 + tl.exp2(-logit * _LOG2E))
    lse = tl.load(lse_ptr + line, mask=inside, other=0.0)
    tl.store(gated_lse_ptr + line, lse - log_gate, mask=inside)
    tl.store(delta_ptr + line, delta, mask=inside)


@triton.jit
def _gate_kernel(
    d_out_ptr,
    compressed_ptr,
    selected_ptr,
    window_ptr,
    gates_ptr,
    d_gates_ptr,
    d_compressed_ptr,
    lse_s_ptr,
    gated_lse_s_ptr,
    delta_s_ptr,
    lse_w_ptr,
    gated_lse_w_ptr,
    delta_w_ptr,
    lines,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    COMPRESSED: tl.constexpr,
    SELECTED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """ROWS lines of [T·Hq, Dv]."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DV)
    inside = line < lines
    places = line[:, None] * DV + dims[None, :]
    mask = inside[:, None] & (dims[None, :] < DV)
    d_out = tl.load(d_out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(_load_logit(gates_ptr, line, 0, inside))
    delta = _delta(compressed_ptr, places, mask, d_out)
    _store_d_gate(d_gates_ptr, line, 0, inside, delta, gate)
    if COMPRESSED:
        scaled = d_out * gate[:, None]
        tl.store(d_compressed_ptr + places, scaled.to(d_compressed_ptr.dtype.element_ty), mask=mask)
    logit = _load_logit(gates_ptr, line, 1, inside)
    delta = _delta(selected_ptr, places, mask, d_out)
    _store_d_gate(d_gates_ptr, line, 1, inside, delta, tl.sigmoid(logit))
    if SELECTED:
        _store_stats(lse_s_ptr, gated_lse_s_ptr, delta_s_ptr, line, inside, logit, delta)
    logit = _load_logit(gates_ptr, line, 2, inside)
    delta = _delta(window_ptr, places, mask, d_out)
    _store_d_gate(d_gates_ptr, line, 2, inside, delta, tl.sigmoid(logit))
    if WINDOWED:
        _store_stats(lse_w_ptr, gated_lse_w_ptr, delta_w_ptr, line, inside, logit, delta)
