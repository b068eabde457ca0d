"""Putting a run together: the dense base, its grown configuration, the adapter, the batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..config import EMBEDDED_MODEL, ModelSource
from ..errors import ConfigError
from ..models.checkpoint import Checkpoint, resolve
from ..models.config import ModelConfig, RopeConfig
from ..models.families import model_config
from ..models.loader import load_weights
from ..tokenizer import Tokenizer, read_source
from .adapter import Adapter, AdapterConfig, grown_config, stacked
from .batches import BatchPlan, BatchSource
from .corpus import Corpus
from .dialogues import Dialogues
from .sequences import SequenceWriter
from .trainer import LossWeights, Rates, Trainer

CONTEXT = 65_536
_TURNS = 4.0


@dataclass(frozen=True, slots=True)
class Growth:
    """What is made of which base."""

    model: str = EMBEDDED_MODEL  # a dense checkpoint: a folder, a .gguf file or a Hub id
    context: int = CONTEXT
    theta: float | None = None  # raise rope theta to this; None: stretch by yarn
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    seed: int = 0


def grown_rope(base: ModelConfig, context: int, theta: float | None) -> RopeConfig:
    """The rotary embedding of the grown model: yarn (arXiv 2309.00071), or a raised theta.

    Without yarn's factor on queries and keys: it sharpens attention over ever more keys, and a
    sparse query never reads more than it did. Angles that turn ``_TURNS`` times within the base's
    context are left alone. Raises ``ConfigError`` where the base is stretched already.
    """
    if base.rope.kind != "default":
        raise ConfigError(f"the base's rotary embedding is stretched already: {base.rope.kind}")
    if theta is not None:
        return RopeConfig(theta=theta, rotary_dim=base.rope.rotary_dim)
    return RopeConfig(
        theta=base.rope.theta,
        kind="yarn",
        rotary_dim=base.rope.rotary_dim,
        original_max_position=base.max_position,
        options={
            "factor": context / base.max_position,
            "attention_factor": 1.0,
            "beta_fast": _TURNS,
        },
    )


def open_base(growth: Growth) -> tuple[Checkpoint, ModelConfig]:
    """The dense checkpoint that is grown. Raises ``ConfigError`` for one with NSA already."""
    checkpoint = resolve(ModelSource(model=growth.model))
    config = model_config(checkpoint)
    if config.nsa is not None:
        raise ConfigError(f"{growth.model} has sparse attention already: give its dense base")
    if config.qkv_bias or config.o_bias or config.qk_norm or not config.tie_embeddings:
        raise ConfigError(f"{growth.model}: only Llama's plain form with tied embeddings is grown")
    return checkpoint, config


def build_adapter(growth: Growth, base: ModelConfig, device: torch.device) -> Adapter:
    """An adapter of the dense ``base`` that is yet to learn."""
    rope = grown_rope(base, growth.context, growth.theta)
    model = grown_config(base, rope, growth.context, growth.adapter)
    return Adapter.create(model, growth.adapter, device=device, seed=growth.seed)


def build_trainer(
    growth: Growth,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: LossWeights,
    rates: Rates,
    compiled: bool,
    recompute: bool,
) -> Trainer:
    """Base weights on ``device`` in fp32, and an adapter that is yet to learn."""
    checkpoint, config = open_base(growth)
    base = load_weights(checkpoint, config, device=device, dtype=torch.float32)
    return Trainer(
        build_adapter(growth, config, device),
        stacked(base, config.num_layers),
        config,
        dtype=dtype,
        weights=weights,
        rates=rates,
        compiled=compiled,
        recompute=recompute,
    )


def build_source(
    growth: Growth,
    corpus: Path,
    plan: BatchPlan,
    trainer: Trainer,
    dialogues: Path | None = None,
) -> BatchSource:
    """Micro-batches over the corpus in a folder, and dialogues of a file."""
    tokenizer = Tokenizer(read_source(resolve(ModelSource(model=growth.model))))
    writer = SequenceWriter(Corpus.open(corpus), tokenizer)
    held = None if dialogues is None else Dialogues.open(dialogues)
    return BatchSource(writer, plan, trainer.nsa, growth.seed, held)
