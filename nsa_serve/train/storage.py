"""Files of a run: the adapter that is served, the checkpoint that a stopped run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..models.checkpoint import ADAPTER, ADAPTER_FORMAT, AdapterBase
from ..models.config import ModelConfig
from ..models.families.nsa_serve import nsa_to_json
from .adapter import Adapter

Tensor = torch.Tensor

SHARD_BYTES = 15_900_000
_KEPT_FP32 = ("gate.bias",)


def save_adapter(
    folder: Path, adapter: Adapter, *, base: AdapterBase, training: Mapping[str, Any]
) -> int:
    """Write ``adapter.json`` and its safetensors; returns their bytes. ``training`` is free."""
    tensors = {
        f"layers.{layer}.{name}": one.detach().to(_storage_dtype(name)).cpu().contiguous()
        for name, stack in adapter.tensors.items()
        for layer, one in enumerate(stack)
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = _write_shards(folder, "adapter", tensors)
    config = adapter.config
    description = {
        "format": ADAPTER_FORMAT[0],
        "version": ADAPTER_FORMAT[1],
        "base": asdict(base),
        "config": config_json(adapter.model),
        "lora": {
            name: {"rank": r, "alpha": config.alpha(name)} for name, r in config.ranks.items()
        },
        "files": files,
        "training": dict(training),
    }
    write_atomically(folder / ADAPTER, json.dumps(description, indent=1))
    return sum((folder / name).stat().st_size for name in (*files, ADAPTER))


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json of a grown model; ``families.nsa_serve.read`` understands it."""
    assert model.nsa is not None
    rope: dict[str, Any] = {
        "rope_type": model.rope.kind, "rope_theta": model.rope.theta, **model.rope.options
    }  # fmt: skip
    if model.rope.original_max_position is not None:
        rope["original_max_position_embeddings"] = model.rope.original_max_position
    eos = list(model.eos_token_ids)
    return {
        "model_type": "nsa_serve",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim_k,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "nsa": nsa_to_json(model.nsa),
    }


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run is."""

    step: int
    num_tokens: int
    seconds: float


def save_checkpoint(
    folder: Path, adapter: Adapter, optimiser: torch.optim.Optimizer, state: RunState
) -> None:
    """Everything a run needs to go on, fp32, in files of at most 16 MB; the last file says so."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        tensors[f"{name}:value"] = tensor.detach().cpu()
        for key, moment in optimiser.state[tensor].items():
            tensors[f"{name}:{key}"] = torch.as_tensor(moment).detach().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {
        f"{name}@{layer}": row.contiguous()
        for name, tensor in tensors.items()
        for layer, row in enumerate(tensor if tensor.ndim else tensor[None])
    }
    # A new name each time: the old files stay whole until the state names the new ones.
    files = _write_shards(folder, f"step{state.step}", pieces)
    record = {
        "step": state.step, "num_tokens": state.num_tokens, "seconds": state.seconds,
        "files": files,
    }  # fmt: skip
    write_atomically(folder / "state.json", json.dumps(record))
    for old in folder.glob("step*.safetensors*"):  # also what a kill left unfinished
        if old.name not in files:
            old.unlink()


def load_checkpoint(
    folder: Path, adapter: Adapter, optimiser: torch.optim.Optimizer
) -> RunState | None:
    """Put back what ``save_checkpoint`` wrote; None where there is no checkpoint.

    Raises ``CheckpointError`` where it is broken or of another adapter.
    """
    if not (folder / "state.json").is_file():
        return None
    try:
        record = json.loads((folder / "state.json").read_text())
        pieces: dict[str, Tensor] = {}
        for file in record["files"]:
            pieces |= load_file(folder / file)
        for name, tensor in adapter.tensors.items():
            _restore(name, tensor, pieces, optimiser)
        return RunState(record["step"], record["num_tokens"], record["seconds"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this adapter: {error}") from error


def _restore(
    name: str, tensor: Tensor, pieces: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> None:
    layers = tensor.shape[0]
    found = {
        key: torch.stack([pieces[f"{name}:{key}@{layer}"] for layer in range(layers)])
        for key in ("value", "exp_avg", "exp_avg_sq")
    }
    with torch.no_grad():
        tensor.copy_(found.pop("value"))
    moments = {key: moment.to(tensor.device) for key, moment in found.items()}
    on_device = optimiser.defaults.get("fused")
    step = pieces[f"{name}:step@0"].to(tensor.device if on_device else "cpu")
    optimiser.state[tensor] = {"step": step, **moments}


def _storage_dtype(name: str) -> torch.dtype:
    return torch.float32 if name in _KEPT_FP32 else torch.bfloat16


def _write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Files of at most ``SHARD_BYTES``, each of whole tensors."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        save_file(group, folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / name)
    return names


def write_atomically(path: Path, text: str) -> None:
    """All of ``text`` or what was there before, whenever the process ends."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
