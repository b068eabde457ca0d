"""A corpus on disk: token ids of documents by source, and records that questions are made of.

A folder holds ``tokens.bin`` (uint16, every source's documents end to end, each closed by the
end-of-text token), ``index.json`` and ``records.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..errors import CheckpointError
from .tasks import ReferenceEntry

Tokens = NDArray[np.uint16]
END_OF_TEXT = 0  # <|endoftext|> of SmolLM2's vocabulary


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sources by name: each one run of tokens."""

    sources: Mapping[str, Tokens]
    records: Mapping[str, tuple[ReferenceEntry, ...]]  # by kind: country, gloss

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.sources.values())

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """The corpus in ``folder``, mapped and not read. Raises ``CheckpointError``."""
        try:
            index = json.loads((folder / "index.json").read_text())
            records = json.loads((folder / "records.json").read_text())
            tokens = np.memmap(folder / "tokens.bin", np.uint16, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no corpus there: {error}") from error
        sources = {name: tokens[start:stop] for name, (start, stop) in index["sources"].items()}
        return cls(
            sources,
            {kind: tuple(ReferenceEntry(**row) for row in rows) for kind, rows in records.items()},
        )


def write_corpus(
    folder: Path, sources: Mapping[str, Tokens], records: Mapping[str, Iterable[ReferenceEntry]]
) -> None:
    """Write what ``Corpus.open`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    spans, at = {}, 0
    with (folder / "tokens.bin").open("wb") as file:
        for name, tokens in sources.items():
            tokens.astype(np.uint16).tofile(file)
            spans[name] = (at, at + len(tokens))
            at += len(tokens)
    (folder / "index.json").write_text(json.dumps({"sources": spans}, indent=1))
    rows = {kind: [asdict(record) for record in table] for kind, table in records.items()}
    (folder / "records.json").write_text(json.dumps(rows))


def tokenise(documents: Iterable[str], tokenizer: tokenizers.Tokenizer) -> Tokens:
    """Token ids of documents, in their order, each closed by the end-of-text token."""
    encoded = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    pieces = [np.array([*row.ids, END_OF_TEXT], np.uint16) for row in encoded]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)


def cut(corpus: Corpus, max_tokens: int) -> Corpus:
    """At most ``max_tokens`` of ``corpus``: the first of each source, in proportion."""
    share = min(1.0, max_tokens / max(1, corpus.num_tokens))
    sources = {name: tokens[: int(len(tokens) * share)] for name, tokens in corpus.sources.items()}
    return Corpus(sources, corpus.records)
