"""Builders of small adapters, in the format that training writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_serve.config import ModelSource
from nsa_serve.models.adapter import adapter_shapes
from nsa_serve.models.checkpoint import resolve
from nsa_serve.models.families import model_config
from nsa_serve.models.loader import parameter_shapes


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_adapter(
    folder: Path,
    base: Mapping[str, Any],
    config: Mapping[str, Any],
    low_rank: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    **changes: Any,
) -> Path:
    """adapter.json and two files of tensors: random ones of every name, unless given."""
    table = {
        "format": "nsa_serve.adapter", "version": 1, "base": base, "config": config,
        "lora": low_rank, "files": [], "training": {"step": 7},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder, table)
    tensors = dict(random_adapter(folder) if tensors is None else tensors)
    names = [f"adapter-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file(dict(list(tensors.items())[i::2]), folder / name)
    write_table(folder, {**table, "files": names, **changes})
    return folder


def write_table(folder: Path, table: Mapping[str, Any]) -> None:
    (folder / "adapter.json").write_text(json.dumps(table))


def random_adapter(folder: Path, seed: int = 5) -> dict[str, Tensor]:
    """Tensors for the adapter.json in ``folder``, which need not name any file yet."""
    checkpoint = resolve(ModelSource(model=str(folder)))
    config = model_config(checkpoint)
    shapes = adapter_shapes(config, checkpoint.low_rank, parameter_shapes(config), ())
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
