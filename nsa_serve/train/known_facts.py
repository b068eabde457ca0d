"""Short answers that are right, as tables: ``known_facts.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class FactTable:
    """Rows of one kind: each fills any of ``questions`` and any of ``answers``."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class KnownFacts:
    """What every row holds is told in the file."""

    units: tuple[tuple[str, str, str, int], ...]
    opposites: tuple[tuple[str, str], ...]
    synonyms: tuple[tuple[str, str, str], ...]
    deeds: tuple[tuple[str, str, str, str], ...]
    groups: Rows
    proverbs: tuple[tuple[str, str], ...]
    translations: tuple[tuple[str, str, str, str, str], ...]
    single: tuple[tuple[str, str], ...]
    tables: tuple[FactTable, ...]


@cache
def known_facts() -> KnownFacts:
    """The tables, read once."""
    text = files(__package__).joinpath("known_facts.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), KnownFacts)
