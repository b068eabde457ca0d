"""The serving Decoder in training mode: the same parameters and formulas, over packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..kernels.shapes import Compressor, NSAShape, Phi
from ..kernels.training.attention import compress_keys, nsa_attention
from ..kernels.training.packed import PackedBatch
from ..models.config import ModelConfig
from ..models.families.placement import fused_rows
from ..models.rope import Rotary
from .importance import ImportanceLoss
from .row_ops import RowOps

Tensor = torch.Tensor
_SHORT = 1024  # tokens of a sequence that the teacher reads together with others
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
        compressor = Compressor(k=self.phis[layer])
        entries = compress_keys(k, self.batch, nsa=self.nsa, compressor=compressor)
        if self.importance is not None:
            self.importance.add(q, k, entries)
        return nsa_attention(
            q, k, v, gates, self.batch, nsa=self.nsa, compressor=compressor, k_entries=entries
        )


class DenseCausalAttention:
    """Causal attention of each packed sequence over all of itself: the teacher's.

    Sequences of up to ``_SHORT`` tokens are padded and computed together, those of one power of
    two in one call: hundreds of calls for hundreds of dialogues would cost more than their work.
    """

    def __init__(self, seq_lens: Sequence[int], device: torch.device) -> None:
        groups = _rows_of_groups(seq_lens)
        kept = [torch.nonzero(rows.flatten() >= 0)[:, 0] for rows in groups]
        pairs = zip(groups, kept, strict=True)
        self.order = torch.cat([rows.flatten()[own] for rows, own in pairs]).argsort().to(device)
        self.groups = [rows.clamp(min=0).to(device) for rows in groups]
        self.kept = [own.to(device) for own in kept]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        pairs = zip(self.groups, self.kept, strict=True)
        return torch.cat([self._attend(q, k, v, rows)[own] for rows, own in pairs])[self.order]

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """Of the sequences whose tokens are ``rows`` [N, L], some padded: [N · L, Hq, Dv]."""
        # Padding stands at the ends, where no token that counts can see it.
        q, k, v = (x[rows].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def _rows_of_groups(seq_lens: Sequence[int]) -> list[Tensor]:
    """Token numbers [N, L] of sequences that are computed together, −1 where one has ended."""
    groups: dict[tuple[int, int], list[Tensor]] = {}
    start = 0
    for at, length in enumerate(seq_lens):
        # A long sequence makes a group of its own.
        key = (length.bit_length(), 0) if length <= _SHORT else (0, at)
        groups.setdefault(key, []).append(torch.arange(start, start + length))
        start += length
    return [pad_sequence(own, batch_first=True, padding_value=-1) for own in groups.values()]


def angles_of(rotary: Rotary, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] fp32 of the packed tokens, each counted from its sequence's start."""
    return rotary(batch.positions)
