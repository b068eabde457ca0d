"""Going on from an adapter that is there, or part of the way back to its base.

Its weights are taken, and the record of how it was made.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..models.checkpoint import (
    ADAPTER,
    AdapterBase,
    Checkpoint,
    LowRank,
    check_is_base,
    open_adapter,
)
from ..models.config import ModelConfig
from ..models.families import model_config
from ..models.loader import load_adapter
from ..models.safetensors_file import read_json
from .adapter import Adapter
from .storage import save_adapter

Tensor = torch.Tensor


def warm_start(adapter: Adapter, folder: Path, base: Checkpoint) -> tuple[dict[str, Any], ...]:
    """Give ``adapter`` the weights in ``folder``, made for ``base``, a GGUF file.

    Returns what adapter.json says of the runs that made them, the first one first. Raises
    ``CheckpointError``, in one line with the file and the key, where the base's digest, the model
    or the ranks are others than this run's, and where the files are broken.
    """
    check_is_base(base)
    checkpoint = open_adapter(folder, base_file=base.path)
    assert checkpoint.base is not None
    _check_model(checkpoint, model_config(checkpoint), adapter.model)
    _check_ranks(checkpoint, adapter)
    checkpoint.base.check_digest()
    earlier = _records(folder)
    device = next(iter(adapter.tensors.values())).device
    _fill(adapter, load_adapter(checkpoint, adapter.model, device=device), folder)
    return earlier


def towards_base(adapter: Adapter, folder: Path, base: Checkpoint, out: Path, share: float) -> int:
    """Write to ``out`` the adapter in ``folder`` with ``share`` of what LoRA adds to the base.

    The mean of a base's weights and of those trained from it keeps much of what either can do
    (arXiv 2109.01903). Gates and φ stay, since the base has none. Returns the bytes written; raises
    as ``warm_start`` does.
    """
    earlier = warm_start(adapter, folder, base)
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            if name.endswith("lora_b"):
                tensor.mul_(share)
    training = {"lora_share": share, "earlier": list(earlier)}
    return save_adapter(out, adapter, base=AdapterBase.of(base), training=training)


def _check_model(checkpoint: Checkpoint, found: ModelConfig, ours: ModelConfig) -> None:
    for name in (field.name for field in fields(ModelConfig)):
        theirs, wanted = getattr(found, name), getattr(ours, name)
        if theirs != wanted:
            file = checkpoint.config_file
            raise CheckpointError(
                f"{file}: its config makes {name} {theirs}, this run's is {wanted}"
            )


def _check_ranks(checkpoint: Checkpoint, adapter: Adapter) -> None:
    config = adapter.config
    wanted = {name: LowRank(rank, config.alpha(name)) for name, rank in config.ranks.items()}
    for name in sorted(wanted.keys() | checkpoint.low_rank.keys()):
        theirs, ours = checkpoint.low_rank.get(name), wanted.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{checkpoint.config_file}: its lora.{name} is {theirs}, this run's is {ours}"
            )


def _fill(adapter: Adapter, given: dict[str, Tensor], folder: Path) -> None:
    rows = {
        name: [f"layers.{layer}.{name}" for layer in range(adapter.model.num_layers)]
        for name in adapter.tensors
    }
    for name in sorted(given.keys() - {name for names in rows.values() for name in names}):
        raise CheckpointError(f"{folder}: {name} is not among what a run trains")
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            tensor.copy_(torch.stack([given[row] for row in rows[name]]))


def _records(folder: Path) -> tuple[dict[str, Any], ...]:
    last = read_json(folder / ADAPTER).get("training", {})
    earlier = last.get("earlier", []) if isinstance(last, dict) else None
    if not isinstance(earlier, list) or not all(isinstance(run, dict) for run in earlier):
        raise CheckpointError(f"{folder / ADAPTER}: training is no record of runs")
    return (*earlier, {key: value for key, value in last.items() if key != "earlier"})
