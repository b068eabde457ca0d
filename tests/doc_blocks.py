"""Fenced blocks of the documentation, and the commands in them.

A block that can't run in a test has a comment right above it, ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_OURS = re.compile(r"(?:\w+=\S+ )*(?:\.venv/bin/)?((?:nsa-serve|python -m|make|pip install) )")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where it stands, in which language, and why it is not run, if it isn't."""

    page: str
    line: int
    language: str
    body: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Shell commands. In a console block those after ``$``, without what they printed."""
        if self.language == "bash":
            return [c for c in _whole_commands(self.body.splitlines()) if not c.startswith("#")]
        lines = self.body.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
        return [next(_whole_commands([lines[i][2:], *lines[i + 1 :]])) for i in starts]


def blocks(*languages: str) -> Iterator[Block]:
    """Every block of these languages in the pages; "" for blocks that name none."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match["language"] in languages:
                yield Block(
                    str(page.relative_to(ROOT)),
                    text.count("\n", 0, match.start("body")),
                    match["language"],
                    match["body"].replace(f"\n{match['indent']}", "\n"),
                    match["reason"],
                )


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command of ours that stands in a sentence, between backquotes."""
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            if _OURS.match(span):
                yield str(page.relative_to(ROOT)), shlex.split(_OURS.sub(r"\1", span))


def _whole_commands(lines: list[str]) -> Iterator[str]:
    """Lines joined where a backslash, a quote or a here-document goes on."""
    command = ""
    for line in lines:
        command += line
        if command.endswith("\\") or not _is_whole(command):
            command += "\n"
            continue
        if command.strip():
            yield command.strip()
        command = ""
    if command.strip():
        yield command.strip()


def _is_whole(command: str) -> bool:
    word = re.search(r"<<-?\s*['\"]?(\w+)", command)
    if word:
        return command.rstrip().endswith("\n" + word[1])
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def words(command: str) -> list[str]:
    """The command's words, its comment and its continuation lines taken away."""
    return shlex.split(command.replace("\\\n", " "), comments=True)
