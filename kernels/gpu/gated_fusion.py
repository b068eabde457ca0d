"""The gated sum of the three branches (arXiv 2502.11089, equation 5)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch
from .decode_sparse import decode_sparse_attention
from .paged_tiles import check_sparse
from .sparse_pass import fused_pass, sparse_pass

Tensor = torch.Tensor

_ROWS = 4


def gated_fusion(
    out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gate_logits: Tensor
) -> Tensor:
    """Sum [T, Hq, Dv] of the branches, each times the sigmoid of its gate, in fp32.

    ``gate_logits`` [T, Hq, 3] in the order compressed, selected, window. Raises ``ContractError``
    where shapes differ.
    """
    branches = (out_compressed, out_selected, out_window)
    check(len({x.shape for x in branches}) == 1, "branches differ in shape", out=out_compressed)
    wanted = (*out_compressed.shape[:2], 3)
    check(gate_logits.shape == wanted, "gates are not [T, Hq, 3]", gate_logits=gate_logits)
    out = torch.empty_like(out_selected, memory_format=torch.contiguous_format)
    lines = out.shape[0] * out.shape[1]
    if lines == 0:
        return out
    _fuse_kernel[(triton.cdiv(lines, _ROWS),)](
        *(x.contiguous() for x in branches),
        gate_logits.contiguous(),
        out,
        lines,
        DV=out.shape[2],
        BLOCK_DV=triton.next_power_of_2(out.shape[2]),
        ROWS=_ROWS,
        num_warps=4,
    )
    return out


def sparse_attention(
    q: Tensor,
    kv: PagedKV,
    selection: Tensor,
    out_compressed: Tensor | None,
    gate_logits: Tensor | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    slots: Tensor | None = None,
) -> Tensor:
    """Selected and window attention and the gated sum of the three branches, [T, Hq, Dv].

    ``q`` [T, Hq, Dk]; ``selection`` and ``slots`` as in ``selected_attention``; ``out_compressed``
    [T, Hq, Dv], None where that branch adds nothing; ``gate_logits`` [T, Hq, 3], None for the fixed
    gates (0, 1, 0): the selected branch alone. Raises ``ContractError`` where shapes do not fit.
    """
    check_sparse(q, kv, batch, nsa)
    if batch.is_short:
        return decode_sparse_attention(
            q, kv, selection, out_compressed, gate_logits, batch, nsa=nsa, slots=slots
        )
    if gate_logits is None:
        return sparse_pass(q, kv, selection, batch, nsa=nsa, slots=slots)
    if out_compressed is not None:
        out_compressed = out_compressed.contiguous()
    return fused_pass(q, kv, selection, out_compressed, gate_logits, batch, nsa=nsa, slots=slots)


@triton.jit
def _fuse_kernel(
    compressed_ptr,
    selected_ptr,
    window_ptr,
    gates_ptr,
    out_ptr,
    lines,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS lines of [T·Hq, Dv]."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DV)
    places = line[:, None] * DV + dims[None, :]
    mask = (line < lines)[:, None] & (dims[None, :] < DV)
    gates = gates_ptr + line * 3
    inside = line < lines
    gate_c = tl.sigmoid(tl.load(gates, mask=inside, other=0.0).to(tl.float32))
    gate_s = tl.sigmoid(tl.load(gates + 1, mask=inside, other=0.0).to(tl.float32))
    gate_w = tl.sigmoid(tl.load(gates + 2, mask=inside, other=0.0).to(tl.float32))
    out = tl.load(compressed_ptr + places, mask=mask, other=0.0).to(tl.float32) * gate_c[:, None]
    out += tl.load(selected_ptr + places, mask=mask, other=0.0).to(tl.float32) * gate_s[:, None]
    out += tl.load(window_ptr + places, mask=mask, other=0.0).to(tl.float32) * gate_w[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)
