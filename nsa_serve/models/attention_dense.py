"""Causal attention over the whole paged cache."""

from __future__ import annotations

from types import ModuleType

import torch

from ..kernels.shapes import Compressor, NSAShape
from .step import StepInputs

Tensor = torch.Tensor


class DenseAttention:
    """One layer's attention: write this step's K/V, then attend to all that is in the cache."""

    def __init__(self, layer: int, ops: ModuleType) -> None:
        self.layer = layer
        self.ops = ops
        # Only the page of these is read: nothing is compressed.
        self.shape = NSAShape()
        self.compressor = Compressor()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, step: StepInputs
    ) -> Tensor:
        """q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] → [T, Hq, Dv]; there are no gates."""
        kv = step.kv[self.layer]
        self.ops.kv_write(k, v, kv, None, step.batch, nsa=self.shape, compressor=self.compressor)
        out: Tensor = self.ops.dense_attention(q, kv, step.batch)
        return out
