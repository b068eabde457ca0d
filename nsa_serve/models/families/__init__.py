"""The families of checkpoints: how each states its configuration and names its tensors.

A new family is one file with ``read``, and a row in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..rope import inverse_frequencies
from . import llama, nsa_serve, qwen2, qwen3
from .options import Options, eos_token_ids
from .placement import Placement, dense_placements

__all__ = ["FAMILIES", "Family", "Placement", "model_config", "placements"]


@dataclass(frozen=True, slots=True)
class Family:
    """``read`` makes a ``ModelConfig`` of config.json; ``placements`` names its tensors."""

    read: Callable[[Options], ModelConfig]
    placements: Callable[[ModelConfig], list[Placement]] = dense_placements


# By config.json's model_type.
FAMILIES = {
    "llama": Family(llama.read),
    "qwen2": Family(qwen2.read),
    "qwen3": Family(qwen3.read),
    "nsa_serve": Family(nsa_serve.read, nsa_serve.placements),
}


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """What the checkpoint says it is.

    Raises ``CheckpointError``, naming file and key, for an unknown model_type, a missing key, and
    any option that would change the maths and is not implemented.
    """
    file = checkpoint.config_file
    kind = checkpoint.config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{file}: model_type {kind!r} is not supported; known: {known}")
    options = Options(checkpoint.config, file)
    config = FAMILIES[kind].read(options)
    options.finish()
    _check_rope(config, file)
    return replace(
        config,
        bos_token_id=checkpoint.config.get("bos_token_id"),
        eos_token_ids=eos_token_ids(checkpoint.config, checkpoint.generation_config),
    )


def _check_rope(config: ModelConfig, file: str) -> None:
    """Refuse now, with the file's name, what would fail when the model is built."""
    try:
        inverse_frequencies(config.rope, config.head_dim_k, config.max_position)
    except (CheckpointError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def placements(config: ModelConfig) -> list[Placement]:
    """Where each tensor of the checkpoint goes."""
    return FAMILIES[config.family].placements(config)
