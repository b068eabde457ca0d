"""Native Sparse Attention of one layer over the paged cache (arXiv 2502.11089, section 3)."""

from __future__ import annotations

from types import ModuleType

import torch

from ..kernels.shapes import Compressor, NSAShape
from .step import StepInputs

Tensor = torch.Tensor


class NSAAttention:
    """Write K/V and completed entries, select blocks, attend by the three branches."""

    def __init__(
        self, layer: int, ops: ModuleType, shape: NSAShape, compressor: Compressor
    ) -> None:
        self.layer = layer
        self.ops = ops
        self.shape = shape
        self.compressor = compressor

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, step: StepInputs
    ) -> Tensor:
        """q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], gate_logits [T, Hq, 3] → [T, Hq, Dv].

        Without ``gate_logits`` the gates are fixed at (0, 1, 0): the compressed branch then only
        selects.
        """
        assert step.compressed is not None
        ops, batch, nsa = self.ops, step.batch, self.shape
        kv, compressed = step.kv[self.layer], step.compressed[self.layer]
        ops.kv_write(k, v, kv, compressed, batch, nsa=nsa, compressor=self.compressor)
        ranked = step.room_for_ranked()
        out_compressed, selection = ops.compressed_attention(
            q, compressed, batch, nsa=nsa, with_output=gate_logits is not None, ranked=ranked
        )
        step.observe(self.layer, selection, gate_logits)
        slots = step.ensure_resident(self.layer, selection)
        out: Tensor = ops.sparse_attention(
            q, kv, selection, out_compressed, gate_logits, batch, nsa=nsa, slots=slots
        )
        step.prefetch(self.layer, selection, ranked)
        return out
