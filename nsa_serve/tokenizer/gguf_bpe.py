"""A byte-level BPE tokenizer from GGUF metadata, the same as the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from ..errors import CheckpointError

# GGUF's tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split_pattern(digits: str) -> str:
    """The word pattern of Llama 3 and Qwen 2, which differ in how many digits make a word."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a named pre-tokenizer of GGUF cuts text into words before BPE merges within each."""

    digits: bool = False  # every digit is a word, then GPT-2's pattern
    pattern: str | None = None  # None: GPT-2's pattern
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole

    def build(self) -> PreTokenizer:
        if self.pattern is not None:
            split = Split(Regex(self.pattern), behavior="isolated")
            return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        words = ByteLevel(add_prefix_space=False, use_regex=True)
        return Sequence([Digits(individual_digits=True), words]) if self.digits else words


_LLAMA3 = _PreTokenizer(pattern=_split_pattern(r"\p{N}{1,3}"), ignore_merges=True)
_QWEN2 = _PreTokenizer(pattern=_split_pattern(r"\p{N}"), nfc=True)
_KNOWN = {
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(digits=True),
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def build_bpe(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that tokenizer.ggml.* describes.

    Raises ``CheckpointError``, naming the key, for a kind that is not read: then the model's own
    tokenizer.json can be given by --tokenizer.
    """
    kind = _pre_tokenizer(metadata, path)
    tokens = _require(metadata, "tokenizer.ggml.tokens", path)
    merges = _require(metadata, "tokenizer.ggml.merges", path)
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_merge(line, path) for line in merges],
            ignore_merges=kind.ignore_merges,
        )
    )
    if kind.nfc:
        tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = kind.build()
    tokenizer.decoder = ByteLevelDecoder()
    _add_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    _add_post_processor(tokenizer, tokens, metadata)
    return tokenizer


def _pre_tokenizer(metadata: Mapping[str, Any], path: Path) -> _PreTokenizer:
    model = _require(metadata, "tokenizer.ggml.model", path)
    if model != "gpt2":
        raise _unsupported(path, "tokenizer.ggml.model", model, ["gpt2"])
    name = _require(metadata, "tokenizer.ggml.pre", path)
    if name not in _KNOWN:
        raise _unsupported(path, "tokenizer.ggml.pre", name, list(_KNOWN))
    return _KNOWN[name]


def _unsupported(path: Path, key: str, value: str, known: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} {value!r} is not supported, only {', '.join(known)}; "
        "give a folder with the model's tokenizer.json by --tokenizer"
    )


def _require(metadata: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in metadata:
        raise CheckpointError(f"{path}: {key} is missing; give --tokenizer")
    return metadata[key]


def _merge(line: str, path: Path) -> tuple[str, str]:
    left, space, right = line.partition(" ")
    if not space:
        raise CheckpointError(f"{path}: tokenizer.ggml.merges holds {line!r}, which is no pair")
    return left, right


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in text before it is cut into words."""
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _add_post_processor(
    tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]
) -> None:
    """Add the beginning- and end-of-text tokens that the metadata asks for."""
    bos = _wanted_token(tokens, metadata, "bos")
    eos = _wanted_token(tokens, metadata, "eos")
    if bos is None and eos is None:
        return
    present = [token for token in (bos, "$A", eos) if token is not None]
    ids = [(token, tokens.index(token)) for token in (bos, eos) if token is not None]
    tokenizer.post_processor = TemplateProcessing(
        single=present,
        pair=[*present, *(f"{piece}:1" for piece in present if piece != "$A"), "$B:1"],
        special_tokens=list(dict.fromkeys(ids)),
    )


def _wanted_token(tokens: list[str], metadata: Mapping[str, Any], name: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", False)
    return tokens[token_id] if wanted and token_id is not None else None
