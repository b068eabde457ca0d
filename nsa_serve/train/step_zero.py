"""How far the grown model is from the training-free one before it has learnt anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kernels.training.packed import PackedBatch
from .adapter import GATE_BIAS
from .batches import MicroBatch
from .head_loss import TokenLosses, head_loss
from .trainer import Trainer

Tensor = torch.Tensor

# Logits at which the gates are exactly (0, 1, 0) in fp32 and bf16.
_SHUT, _OPEN = -1e4, 1e4


@torch.no_grad()
def step_zero(trainer: Trainer, batch: MicroBatch) -> dict[str, float]:
    """Mean cross-entropies on one micro-batch, and KL(training-free ‖ grown), in nats per token.

    ``dense``: the base as it is; ``training_free``: NSA with gates (0, 1, 0), with the grown
    model's rotary embedding; ``grown``: the adapter as it stands.
    """
    batch = batch.to(trainer.device)
    packed = PackedBatch.build(batch.seq_lens, nsa=trainer.nsa, device=trainer.device)
    merged = trainer.merged()
    fixed = trainer.hidden(_fixed_gates(trainer, merged), batch, packed)[batch.rows]
    dense = trainer.taught(batch)[batch.rows]
    plain = _losses(trainer, batch, fixed, None)
    grown = _losses(trainer, batch, trainer.hidden(merged, batch, packed)[batch.rows], fixed)
    return {
        "dense": _rounded(_losses(trainer, batch, dense, None).entropy),
        "training_free": _rounded(plain.entropy),
        "grown": _rounded(grown.entropy),
        "divergence": _rounded(grown.divergence),
    }


def _losses(
    trainer: Trainer, batch: MicroBatch, hidden: Tensor, taught: Tensor | None
) -> TokenLosses:
    ones = torch.ones_like(batch.targets, dtype=torch.float32)
    _, tokens = head_loss(
        hidden, trainer.head, batch.targets, ce=ones, kl=ones, taught=taught, ops=trainer.ops
    )
    return tokens


def _fixed_gates(trainer: Trainer, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``merged`` with biases of the gates that leave the selected branch alone."""
    rows = trainer.student.rows
    pattern = [_OPEN if bias > 0 else _SHUT for bias in GATE_BIAS]
    fixed = dict(merged)
    for layer in range(trainer.adapter.model.num_layers):
        name = f"layers.{layer}.qkv.bias"
        bias = merged[name].clone()
        gates = torch.tensor(pattern, device=bias.device, dtype=bias.dtype)
        bias[rows.qkv : rows.qkv + rows.gate] = gates.repeat(rows.gate // len(pattern))
        fixed[name] = bias
    return fixed


def _rounded(values: Tensor) -> float:
    return round(float(values.mean()), 5)
