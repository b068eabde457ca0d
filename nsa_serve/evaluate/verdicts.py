"""What people think of two answers: a table to read, a file to fill in, and their counts."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .record import FORMAT, Item, Record

_COLUMNS = ("number", "verdict", "answers", "prompt")
OPEN = "open"


class Verdict(StrEnum):
    """How the model's answer is, seen beside the base's."""

    BETTER = "better"
    EQUAL = "equal"
    WORSE = "worse"


def is_same(item: Item) -> bool:
    return bool(item["answer"] == item["base_answer"])


def count_verdicts(items: Iterable[Item]) -> dict[str, int]:
    """How many of each, and how many are open."""
    counts = Counter(item["verdict"] or OPEN for item in items)
    return {name: counts[name] for name in (*Verdict, OPEN)}


def write_verdicts(path: Path, items: Mapping[str, Item]) -> None:
    """A CSV with a line for each prompt; verdicts that are open are left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for name, item in sorted(items.items()):
            writer.writerow((name, item["verdict"] or "", _digest(item), item["prompt"]))


def read_verdicts(path: Path, items: Mapping[str, Item]) -> dict[str, Verdict | None]:
    """Verdicts by an item's name. Raises ``ConfigError`` for those of other answers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines = {row["number"]: (row["verdict"], row["answers"]) for row in rows}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ConfigError(f"{path} is no file of verdicts: {error}") from None
    if lines.keys() != items.keys():
        raise ConfigError(f"{path} must have one line for each of the {len(items)} prompts")
    for name, (_, digest) in lines.items():
        if digest != _digest(items[name]):
            raise ConfigError(f"{path}: number {name} is of other answers; delete it to judge anew")
    return {name: _verdict(path, name, word) for name, (word, _) in lines.items()}


def open_record(path: Path) -> Record:
    """The record of ``eval chat`` at ``path``. Raises ``ConfigError`` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.pop("format"), content["kind"]) != (FORMAT, "chat"):
            raise ValueError("it is of another kind")
        items = content.pop("items")
        content.pop("summary", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no record of eval chat: {error}") from None
    return Record(path, {"format": FORMAT, **content}, items)


def judge(record: Record, verdicts: Mapping[str, Verdict | None]) -> None:
    """Put ``verdicts`` into the items of ``record``, in memory."""
    for name, verdict in verdicts.items():
        record.items[name] = {**record.items[name], "verdict": verdict}


def as_markdown(record: Record, summary: Mapping[str, Any]) -> str:
    """Both answers to every prompt as a table, and the counts above it."""
    model, base = record.head["subject"]["model"], record.head["settings"]["base"]["model"]
    counts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lines = [
        f"# {model} beside {base}",
        "",
        f"Verdicts on {model}: {counts}. {summary['same']} answers are the same word for word.",
        "",
        f"Mean log-probability of a token by {base}, in nats: "
        f"{summary['base_logprob_of_answers']:.3f} of {model}'s answers, "
        f"{summary['base_logprob_of_own']:.3f} of its own. "
        f"Divergence on its own: at least {summary['divergence']:.4f} nats a token.",
        "",
        f"| | prompt | {model} | {base} | verdict |",
        "|---|---|---|---|---|",
    ]
    for name, item in sorted(record.items.items()):
        cells = (item["prompt"], item["answer"], item["base_answer"], item["verdict"] or "")
        lines.append(f"| {name} | {' | '.join(_cell(text) for text in cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(path: Path, name: str, word: str) -> Verdict | None:
    folded = word.strip().lower()
    if folded and folded not in list(Verdict):
        raise ConfigError(
            f"{path}: number {name} is {word!r}, and not one of {', '.join(Verdict)} or empty"
        )
    return Verdict(folded) if folded else None


def _digest(item: Item) -> str:
    """Names the answers that a verdict is about."""
    answers = json.dumps([item["prompt"], item["answer"], item["base_answer"]])
    return hashlib.sha256(answers.encode()).hexdigest()[:12]


def _cell(text: str) -> str:
    escaped = text.strip().replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(escaped.splitlines())
