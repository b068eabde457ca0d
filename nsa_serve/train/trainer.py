"""One optimiser step: the student's pass, the teacher's in windows of its own, the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from ..kernels.training.packed import PackedBatch
from ..models.config import ModelConfig
from ..models.rope import Rotary, build_rotary
from .adapter import Adapter, phis_of
from .batches import MicroBatch
from .decoder import DenseCausalAttention, PackedDecoder, SparseAttention, angles_of
from .head_loss import TokenLosses, head_loss
from .importance import ImportanceLoss
from .row_ops import RowOps

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Each loss is a mean over its own tokens, so that few answers count as much as long texts."""

    text: float = 0.1  # cross-entropy beside the divergence: alone it makes another model of it
    answer: float = 1.0
    teacher: float = 1.0  # divergence on text
    # Of dialogues. Their gradients are a seventh of an exercise's, and AdamW, whose steps are
    # measured by the larger ones, would let exercises alone decide.
    dialogue: float = 10.0
    spoken: float = 1.0  # cross-entropy beside that divergence: greedy answers should stay greedy
    importance: float = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """AdamW's learning rates at the top of the schedule, and its other numbers."""

    lora: float = 8e-4
    phi: float = 2e-3
    gate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.0
    clip: float = 1.0

    @classmethod
    def scaled(cls, lora: float) -> Rates:
        """A top rate of ``lora`` for LoRA, and the others in their usual proportion to it."""
        usual = cls()
        share = lora / usual.lora
        return cls(lora=lora, phi=share * usual.phi, gate=share * usual.gate)


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Means over one micro-batch, fp32 scalars on the device; NaN where there was nothing."""

    loss: Tensor
    text: Tensor
    answer: Tensor
    answers_right: Tensor  # share of answers' tokens whose argmax is right
    teacher: Tensor
    importance: Tensor
    caught: Tensor  # share of attention beyond the forced blocks that the selection takes
    dialogue: Tensor  # divergence from the teacher on what it said itself

    def stacked(self) -> Tensor:
        """[8] in the order of the fields."""
        return torch.stack([getattr(self, field.name).float() for field in fields(self)])


LOSS_NAMES = tuple(field.name for field in fields(StepLosses))


class Trainer:
    """The model in training: frozen base, adapter, optimiser."""

    def __init__(
        self,
        adapter: Adapter,
        base: Mapping[str, Tensor],
        base_config: ModelConfig,
        *,
        dtype: torch.dtype,
        weights: LossWeights,
        rates: Rates,
        compiled: bool = False,
        recompute: bool = False,
    ) -> None:
        """``base``: ``adapter.stacked`` fp32 parameters of the dense model ``base_config``."""
        self.adapter = adapter
        self.base = base
        self.dtype = dtype
        self.weights = weights
        self.rates = rates
        self.device = base["embed"].device
        self.ops = RowOps.build(compiled=compiled)
        model = adapter.model
        assert model.nsa is not None
        self.nsa = model.nsa.shape
        self.student = PackedDecoder(model, self.ops, recompute=recompute)
        self.teacher = PackedDecoder(base_config, self.ops)
        self.rotary = _rotary(model, self.device)
        self.teacher_rotary = _rotary(base_config, self.device)
        self.teacher_weights = _unstacked(base, base_config.num_layers, dtype)
        self.head = self.teacher_weights.get("lm_head", self.teacher_weights["embed"])
        adapter.require_grad()
        self.optimiser = build_optimiser(adapter, rates)

    def step(self, batches: Sequence[MicroBatch], factor: float) -> tuple[list[StepLosses], Tensor]:
        """One update from ``batches`` at ``factor`` of the top rates: losses, gradient's norm."""
        self.optimiser.zero_grad(set_to_none=True)
        found = []
        for batch in batches:
            losses = self.losses(batch)
            (losses.loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            found.append(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.tensors.values(), self.rates.clip)
        self.drop_unless_finite(norm)
        for group in self.optimiser.param_groups:
            group["lr"] = group["top_rate"] * factor
        self.optimiser.step()
        return found, norm

    def drop_unless_finite(self, norm: Tensor) -> None:
        """No gradient at all from a step where some are not finite, without asking the device."""
        finite = norm.isfinite()
        for tensor in self.adapter.tensors.values():
            if tensor.grad is not None:
                tensor.grad = torch.where(finite, tensor.grad, 0.0)

    def losses(self, batch: MicroBatch) -> StepLosses:
        """The losses of one micro-batch, of which ``loss`` has gradients."""
        packed = PackedBatch.build(batch.seq_lens, nsa=self.nsa, device=self.device)
        importance = ImportanceLoss(batch.probes, self.nsa) if batch.probes else None
        hidden = self.hidden(self.merged(), batch, packed, importance)[batch.rows]
        taught = self.taught(batch)[batch.rows]
        ce, kl = self._token_weights(batch)
        loss, tokens = head_loss(
            hidden, self.head, batch.targets, ce=ce, kl=kl, taught=taught, ops=self.ops
        )
        if importance is not None:
            loss = loss + self.weights.importance * importance.total()
        return _summary(loss, tokens, batch, importance)

    def merged(self) -> dict[str, Tensor]:
        return self.adapter.merged(self.base, self.dtype)

    def hidden(
        self,
        weights: Mapping[str, Tensor],
        batch: MicroBatch,
        packed: PackedBatch,
        importance: ImportanceLoss | None = None,
    ) -> Tensor:
        """Hidden states [T, H] of the NSA model with merged ``weights``."""
        phis = phis_of(weights, self.adapter.model.num_layers)
        attend = SparseAttention(packed, self.nsa, phis, importance)
        angles = angles_of(self.rotary, packed)
        return self.student.hidden(weights, batch.token_ids, angles, attend)

    @torch.no_grad()
    def taught(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, H] of the dense base model, which reads each window by itself."""
        packed = PackedBatch.build(batch.teacher_lens, nsa=self.nsa, device=self.device)
        angles = angles_of(self.teacher_rotary, packed)
        attend = DenseCausalAttention(batch.teacher_lens, self.device)
        return self.teacher.hidden(self.teacher_weights, batch.token_ids, angles, attend)

    def _token_weights(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Weights [R] fp32 of each token's cross-entropy and of its divergence."""
        answers = batch.answers.float()
        spoken = batch.spoken.float()
        texts = batch.texts.float()
        ce = self.weights.text * texts / texts.sum().clamp(min=1)
        ce = ce + self.weights.answer * answers / answers.sum().clamp(min=1)
        ce = ce + self.weights.spoken * spoken / spoken.sum().clamp(min=1)
        # On an exercise's answers the teacher is no authority: it misses some.
        told = (batch.taught & batch.spoken).float()
        taught = (batch.taught & ~batch.answers & ~batch.spoken).float()
        kl = self.weights.teacher * taught / taught.sum().clamp(min=1)
        return ce, kl + self.weights.dialogue * told / told.sum().clamp(min=1)


def build_optimiser(adapter: Adapter, rates: Rates) -> torch.optim.AdamW:
    """AdamW over the adapter's fp32 tensors, in groups by learning rate."""
    groups: dict[float, list[Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        kind = rates.phi if name.startswith("phi") else rates.lora
        groups.setdefault(rates.gate if name.startswith("gate") else kind, []).append(tensor)
    return torch.optim.AdamW(
        [{"params": tensors, "top_rate": rate} for rate, tensors in groups.items()],
        betas=rates.betas,
        weight_decay=rates.weight_decay,
        fused=next(iter(adapter.tensors.values())).is_cuda,
    )


def _rotary(config: ModelConfig, device: torch.device) -> Rotary:
    return build_rotary(config.rope, config.head_dim_k, config.max_position, device)


def _unstacked(
    base: Mapping[str, Tensor], num_layers: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Parameters by the names of ``families.placement``, in ``dtype``."""
    whole = ("embed", "norm", "lm_head")
    weights = {name: base[name].to(dtype) for name in whole if name in base}
    for name in base.keys() - set(whole):
        rows = base[name].to(dtype).unbind()
        weights |= {f"layers.{layer}.{name}": rows[layer] for layer in range(num_layers)}
    return weights


def _summary(
    loss: Tensor, tokens: TokenLosses, batch: MicroBatch, importance: ImportanceLoss | None
) -> StepLosses:
    others = batch.taught & ~batch.answers & ~batch.spoken
    nothing = loss.new_full((), torch.nan)
    return StepLosses(
        loss=loss,
        text=_mean(tokens.entropy, batch.texts),
        answer=_mean(tokens.entropy, batch.answers),
        answers_right=_mean(tokens.right, batch.answers),
        teacher=_mean(tokens.divergence, others),
        importance=nothing if importance is None else importance.total().detach(),
        caught=nothing if importance is None else importance.caught_share(),
        dialogue=_mean(tokens.divergence, batch.spoken),
    )


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """NaN where nothing is."""
    return (values * where).sum() / where.sum()
