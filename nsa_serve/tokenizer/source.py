"""What a tokenizer is made of: read from a checkpoint once, then sent wherever one is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckpointError, ConfigError
from ..models.checkpoint import Checkpoint
from ..models.safetensors_file import read_json
from .gguf_bpe import build_bpe

# The names under which chat templates expect special tokens.
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_GGUF_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "separator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
DEFAULT_TEMPLATE = "default"


class TokenizerSource(msgspec.Struct, frozen=True, kw_only=True):
    """The texts that define a tokenizer; ``Tokenizer`` is built from it in any process."""

    tokenizer_json: str  # the content of a tokenizer.json
    special_tokens: dict[str, str]  # bos_token, eos_token, ...: their text
    chat_templates: dict[str, str] = {}  # by name: "default", "tool_use", ...


def read_source(checkpoint: Checkpoint, chat_template: str | None = None) -> TokenizerSource:
    """Read a checkpoint's tokenizer. ``chat_template`` is a file that replaces its template.

    Raises ``CheckpointError`` where there is no tokenizer or its kind is not supported, and
    ``ConfigError`` where the template file can't be read.
    """
    folder = checkpoint.tokenizer_path
    source = _from_folder(folder) if folder else _from_gguf(checkpoint.metadata, checkpoint.path)
    if chat_template is None:
        return source
    templates = {DEFAULT_TEMPLATE: _read_template(chat_template)}
    return msgspec.structs.replace(source, chat_templates=templates)


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {name}: can't be read: {error}") from error


def _from_folder(folder: Path) -> TokenizerSource:
    path = folder / "tokenizer.json"
    try:
        tokenizer_json = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; only tokenizer.json is read") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    return TokenizerSource(
        tokenizer_json=tokenizer_json,
        special_tokens=_special_tokens(config),
        chat_templates=_configured_templates(config) | _template_files(folder),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _configured_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """``chat_template`` of tokenizer_config.json: one text, or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, str):
        return {DEFAULT_TEMPLATE: template}
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    return {}


def _template_files(folder: Path) -> dict[str, str]:
    """Template files beside the tokenizer, newest convention last; they outrank its config."""
    found = {}
    legacy, single = folder / "chat_template.json", folder / "chat_template.jinja"
    if legacy.is_file():
        found[DEFAULT_TEMPLATE] = str(read_json(legacy)["chat_template"])
    if single.is_file():
        found[DEFAULT_TEMPLATE] = single.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _from_gguf(metadata: Mapping[str, Any], path: Path) -> TokenizerSource:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is missing; give --tokenizer")
    special = {}
    for name, short in _GGUF_SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if token_id is not None and token_id < len(tokens):
            special[name] = tokens[token_id]
    return TokenizerSource(
        tokenizer_json=build_bpe(metadata, path).to_str(),
        special_tokens=special,
        chat_templates=_gguf_templates(metadata),
    )


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    prefix = "tokenizer.chat_template"
    for key, text in metadata.items():
        if key == prefix:
            found[DEFAULT_TEMPLATE] = text
        elif key.startswith(prefix + ".") and isinstance(text, str):
            found[key.removeprefix(prefix + ".")] = text
    return found
