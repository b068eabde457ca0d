"""Needles: what is found is what was read, prompts fill their contexts, runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_serve.errors import ConfigError, EvaluationStopped
from nsa_serve.evaluate.haystack import Haystack, read_documents, sentences_of
from nsa_serve.evaluate.heatmap import save_heatmap
from nsa_serve.evaluate.needle import ANSWER_TOKENS, NeedleGrid, run_needles
from nsa_serve.evaluate.record import Record
from nsa_serve.evaluate.scoring import holds
from tests.eval_subjects import Reader

GRID = NeedleGrid("late_speeches", contexts=(600, 2000), num_depths=5, num_keys=3)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return sentences_of(read_documents("late_speeches", None))


@pytest.fixture
def run(sentences: list[str], tmp_path: Path) -> Callable[..., Record]:
    def run_with(subject: Reader, grid: NeedleGrid = GRID, name: str = "n.json") -> Record:
        record = Record.open(tmp_path / name, "needle", subject.description, grid.settings())
        haystack = Haystack(sentences, subject)
        record.finish(run_needles(grid, subject, haystack, record, lambda count: None))
        return record

    return run_with


def test_a_needle_is_found_exactly_where_memory_reaches(run: Callable[..., Record]) -> None:
    summary = json.loads(run(Reader(memory=700)).path.read_text())["summary"]
    assert summary["by_context"]["600"] == 1.0
    cells = [summary["by_cell"][f"2000/{depth}"] for depth in GRID.depths]
    assert cells == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert summary["found"] == pytest.approx((1.0 + 2 / 5) / 2)


def test_prompts_fill_their_context_and_leave_room_for_the_answer(
    run: Callable[..., Record], sentences: list[str]
) -> None:
    items = run(Reader()).items.values()
    longest = max(len(sentence.split()) for sentence in sentences)
    assert len(items) == GRID.num_prompts
    for item in items:
        free = item["context"] - ANSWER_TOKENS - item["prompt_tokens"]
        assert 0 <= free <= longest + 16


def test_a_value_can_be_known_from_the_needle_alone(run: Callable[..., Record]) -> None:
    reader = Reader()
    items = list(run(reader).items.values())
    for question, item in zip(reader.asked, items, strict=True):
        assert item["expected"].isdigit()
        assert question.text.count(item["expected"]) == 1
    assert len({item["expected"] for item in items}) == GRID.num_keys


def test_a_context_that_is_too_short_is_told_before_anything_is_asked(
    run: Callable[..., Record],
) -> None:
    reader = Reader(max_model_len=1999)
    with pytest.raises(ConfigError, match="asks for 2000 tokens, but the model's context is 1999"):
        run(reader)
    assert reader.asked == []


def test_a_text_that_is_too_short_is_refused(run: Callable[..., Record]) -> None:
    with pytest.raises(ConfigError, match="tokens too short"):
        run(Reader(), replace(GRID, contexts=(1 << 18,)))


def test_a_context_without_room_for_any_text_is_refused(run: Callable[..., Record]) -> None:
    with pytest.raises(ConfigError, match=r"the shortest lacks \d+ tokens for the question"):
        run(Reader(), replace(GRID, contexts=(60, 2000)))


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    run: Callable[..., Record],
) -> None:
    whole = run(Reader(memory=700), name="whole.json").path.read_text()
    with pytest.raises(EvaluationStopped):
        run(Reader(memory=700, num_calls=4), name="part.json")
    rest = Reader(memory=700)
    assert run(rest, name="part.json").path.read_text() == whole
    assert len(rest.asked) == 2 * GRID.num_depths

    again = Reader(memory=700)
    assert run(again, name="part.json").path.read_text() == whole
    assert again.asked == []


def test_results_of_different_evaluations_are_never_mixed(run: Callable[..., Record]) -> None:
    run(Reader())
    with pytest.raises(ConfigError, match="its subject is"):
        run(Reader(memory=5))
    with pytest.raises(ConfigError, match="its settings is"):
        run(Reader(), replace(GRID, seed=1))


@pytest.mark.parametrize("content", ["", "[]", '{"items": 3}', "{"])
def test_a_file_that_is_no_record_is_not_overwritten(
    run: Callable[..., Record], tmp_path: Path, content: str
) -> None:
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(ConfigError, match="no record of an evaluation"):
        run(Reader())
    assert (tmp_path / "n.json").read_text() == content


def test_the_heat_map_is_a_picture_of_the_grid(tmp_path: Path) -> None:
    cells = {(context, depth): depth for context in (1024, 1000) for depth in (0.0, 1.0)}
    path = tmp_path / "new" / "grid.png"
    save_heatmap(path, "title", (1024, 1000), (0.0, 1.0), cells)
    assert path.read_bytes().startswith(b"\x89PNG")
    # Green at the bottom, red at the top: more than one colour in it.
    assert len(set(_pixels(path))) > 10


def _pixels(path: Path) -> list[tuple[float, ...]]:
    from matplotlib import image

    return [tuple(pixel) for row in image.imread(path)[::4] for pixel in row[::4]]


@pytest.mark.parametrize(
    ("answer", "value", "held"),
    [
        ("It is 1,234,567.", "1234567", True),
        ("It is 12345678.", "1234567", False),
        ("the WALRUS\n-copper thing", "walrus", True),
        ("walruses", "walrus", False),
        ("a b-c", "b", True),
        ("", "b", False),
        ("ab12-cd34", "ab12-cd34", True),
    ],
)
def test_a_value_is_found_as_a_whole(answer: str, value: str, held: bool) -> None:
    assert holds(answer, value) is held


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs the package r-cran-janeaustenr: give --packages"):
        read_documents("emma", tmp_path)
    with pytest.raises(ConfigError, match="is none of emma, late_speeches, concise_commentary"):
        read_documents(str(tmp_path / "no.txt"), None)


def test_ones_own_text_is_read(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("One  sentence. Another\none! And a third?")
    assert sentences_of(read_documents(str(file), None)) == [
        "One sentence.", "Another one!", "And a third?",
    ]  # fmt: skip
