"""The serving Decoder in training mode: the same parameters and formulas, over packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.shapes import Compressor, NSAShape, Phi
from ..kernels.training.attention import nsa_attention
from ..kernels.training.packed import PackedBatch
from ..models.config import ModelConfig
from ..models.families.placement import fused_rows
from ..models.rope import Rotary
from .importance import ImportanceLoss
from .row_ops import RowOps

Tensor = torch.Tensor
# (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], gate logits [T, Hq, 3]) → [T, Hq, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


class PackedDecoder:
    """One pass over packed sequences with weights by the names of ``families.placement``.

    ``recompute`` keeps a layer's MLP out of memory and computes it again in the backward pass.
    """

    def __init__(self, config: ModelConfig, ops: RowOps, *, recompute: bool = False) -> None:
        self.config = config
        self.ops = ops
        self.recompute = recompute
        self.rows = fused_rows(config)

    def hidden(
        self,
        weights: Mapping[str, Tensor],
        token_ids: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """Hidden states [T, H] after the last norm; ``angles`` are cos and sin [T, D/2]."""
        eps, ops = self.config.rms_norm_eps, self.ops
        residual = F.embedding(token_ids, weights["embed"])
        first = weights["layers.0.input_norm"]
        x, residual = ops.add_rms_norm(torch.zeros_like(residual), residual, first, eps)
        for layer in range(self.config.num_layers):
            own = f"layers.{layer}"
            q, k, v, gates = self._project(weights, own, x, angles)
            attended = attend(layer, q, k, v, gates).flatten(1)
            x = F.linear(attended, weights[f"{own}.o.weight"])
            x, residual = ops.add_rms_norm(x, residual, weights[f"{own}.post_norm"], eps)
            x = self._mlp(x, weights[f"{own}.gate_up.weight"], weights[f"{own}.down.weight"])
            following = weights.get(f"layers.{layer + 1}.input_norm", weights["norm"])
            x, residual = ops.add_rms_norm(x, residual, following, eps)
        return x

    def _project(
        self, weights: Mapping[str, Tensor], own: str, x: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fused = F.linear(x, weights[f"{own}.qkv.weight"], weights.get(f"{own}.qkv.bias"))
        return self.ops.split_rotate(fused, *angles, self.rows, self.config.head_dim_k)

    def _mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._mlp_once(x, gate_up, down)
        out: Tensor = checkpoint(self._mlp_once, x, gate_up, down, use_reentrant=False)
        return out

    def _mlp_once(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return F.linear(self.ops.swiglu_of(F.linear(x, gate_up)), down)


class SparseAttention:
    """NSA of every layer, and on the way the importance loss of some tokens."""

    def __init__(
        self,
        batch: PackedBatch,
        nsa: NSAShape,
        phis: Sequence[Phi],
        importance: ImportanceLoss | None = None,
    ) -> None:
        """``phis`` are the layers' φ_k; φ_v is the mean."""
        self.batch = batch
        self.nsa = nsa
        self.phis = phis
        self.importance = importance

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        phi = self.phis[layer]
        if self.importance is not None:
            self.importance.add(q, k, phi)
        return nsa_attention(q, k, v, gates, self.batch, nsa=self.nsa, compressor=Compressor(k=phi))


class DenseCausalAttention:
    """Causal attention of each packed sequence over all of itself: the teacher's."""

    def __init__(self, seq_lens: Sequence[int]) -> None:
        self.seq_lens = list(seq_lens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        pieces = zip(*(torch.split(x, self.seq_lens) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*piece) for piece in pieces])

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)


def angles_of(rotary: Rotary, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] fp32 of the packed tokens, each counted from its sequence's start."""
    return rotary(batch.positions)
