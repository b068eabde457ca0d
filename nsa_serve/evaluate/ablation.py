"""A model with a part of NSA taken out, to show that an evaluation needs that part."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import torch

from ..errors import ConfigError
from ..models.attention_nsa import NSAAttention
from ..models.decoder import Decoder
from ..models.step import StepInputs

Tensor = torch.Tensor

# Logits at which a gate's sigmoid is exactly 0 in fp32.
_SHUT = -1e4


class Ablation(StrEnum):
    COMPRESSED = "compressed"  # its gate is 0; its scores still select
    SELECTED = "selected"  # its gate is 0
    WINDOW = "window"  # its gate is 0
    SELECTION = "selection"  # no blocks but the forced ones


_BRANCHES = (Ablation.COMPRESSED, Ablation.SELECTED, Ablation.WINDOW)


class _ShutGate(NSAAttention):
    """A layer's attention with the gate of one branch at 0."""

    def __init__(self, whole: NSAAttention, branch: int) -> None:
        super().__init__(whole.layer, whole.ops, whole.shape, whole.compressor)
        self.branch = branch

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, step: StepInputs
    ) -> Tensor:
        assert gate_logits is not None
        shut = gate_logits.clone()
        shut[..., self.branch] = _SHUT
        return super().__call__(q, k, v, shut, step)


def ablate(model: Decoder, ablation: Ablation) -> None:
    """Take ``ablation`` out of every layer. The model must not have run yet.

    Raises ``ConfigError`` where the model has no such part.
    """
    nsa = model.config.nsa
    if nsa is None:
        raise ConfigError("--ablate needs a model served with NSA: use --attention nsa")
    if ablation in _BRANCHES and not nsa.gated:
        raise ConfigError(
            f"--ablate {ablation.value} needs learned gates; this model's are fixed at (0, 1, 0)"
        )
    for layer in model.layers:
        attention = layer.attention
        assert isinstance(attention, NSAAttention)
        if ablation is Ablation.SELECTION:
            forced = attention.shape.num_initial + attention.shape.num_local
            attention.shape = replace(attention.shape, num_selected=forced)
        else:
            layer.attention = _ShutGate(attention, _BRANCHES.index(ablation))
