"""JSON and the headers of safetensors files: what a folder holds, no weights read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .gguf_file import TensorEntry

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or ``CheckpointError``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a folder with one safetensors file, or with several and their index."""
    if (folder / _INDEX).is_file():
        return _sharded_table(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors_header(files[0])
    if files:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files, but no {_INDEX}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: pickled weights are not read; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: no model.safetensors there")


def _sharded_table(folder: Path) -> dict[str, TensorEntry]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no weight_map")
    names = {str(file) for file in weight_map.values()}
    for name in sorted(names):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
    shards = {name: read_safetensors_header(folder / name) for name in names}
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            raise CheckpointError(
                f"{folder / file}: {tensor} is missing, though {_INDEX} names it there"
            )
    return {tensor: shards[file][tensor] for tensor, file in weight_map.items()}


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file; ``CheckpointError`` where it is truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise CheckpointError(f"{path}: truncated: its header ends beyond the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        table = {name: _entry(path, 8 + length, row) for name, row in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file") from error
    for name, entry in table.items():
        if entry.offset + entry.num_bytes > size:
            raise CheckpointError(
                f"{path}: truncated: {name} ends at byte {entry.offset + entry.num_bytes}, "
                f"the file has {size}"
            )
    return table


def _entry(path: Path, start: int, row: dict[str, Any]) -> TensorEntry:
    first, last = row["data_offsets"]
    return TensorEntry(path, row["dtype"], tuple(row["shape"]), start + first, last - first)
