"""What training asks for: values of many forms, facts that look alike, nothing of evaluation's."""

from __future__ import annotations

import random
import re
from dataclasses import fields

import pytest

from nsa_serve.evaluate.haystack import Haystack
from nsa_serve.evaluate.needle import NeedleGrid, run_needles
from nsa_serve.evaluate.record import Record
from nsa_serve.train.phrases import PHRASES, Phrases
from nsa_serve.train.sequences import ANSWER, TEXT, SequenceWriter
from nsa_serve.train.tasks import KINDS, Split, needle_among_alike
from nsa_serve.train.values import VALUES, draw_value, look_alike

from .eval_subjects import Reader
from .tiny_training import PASSAGES, load_tokenizer, make_corpus

TRAIN, HELD_OUT = PHRASES[Split.TRAIN], PHRASES[Split.HELD_OUT]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer):
    return SequenceWriter(make_corpus(tokenizer), tokenizer, text_share=0.0)


def folded(phrase: str) -> str:
    """Without case and punctuation: what two wordings have in common."""
    return " ".join(re.findall(r"[\w{}]+", phrase.casefold()))


def train_texts(kind: str):
    """Facts, questions and answers of many exercises, each a string."""
    options = {"passages": PASSAGES} if kind == "long_copy" else {}
    for seed in range(150):
        exercise = KINDS[kind](random.Random(seed), **options)
        yield from exercise.facts
        for turn in exercise.turns:
            yield from (turn.question, turn.answer)


@pytest.mark.parametrize("name", [field.name for field in fields(Phrases)])
def test_training_has_no_word_name_key_or_wording_of_evaluation(name: str) -> None:
    ours, theirs = ({folded(x) for x in getattr(split, name)} for split in (TRAIN, HELD_OUT))
    assert ours
    assert not ours & theirs


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_exercise_of_training_names_what_evaluation_keeps_to_itself(kind: str) -> None:
    kept = [*HELD_OUT.nouns, *HELD_OUT.owners, *HELD_OUT.words]
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, kept))})\b", re.IGNORECASE)
    texts = list(train_texts(kind))
    assert len(texts) > 300
    assert not [text for text in texts if pattern.search(text)]


@pytest.mark.parametrize("kind", ["needle", "needle_among_alike", "multi_key", "multi_value"])
def test_no_fact_or_question_of_training_is_worded_as_in_evaluation(kind: str) -> None:
    wordings = (*HELD_OUT.facts, *HELD_OUT.questions, *HELD_OUT.several_facts)
    wordings += HELD_OUT.several_questions
    for seed in range(150):
        exercise = KINDS[kind](random.Random(seed))
        values = [value for turn in exercise.turns for value in turn.values]
        theirs = {folded(wording.format(key=key, value=value))
                  for wording in wordings for key in exercise.keys for value in values}  # fmt: skip
        asked = [re.sub(_asides(), "", turn.question) for turn in exercise.turns]
        assert not theirs & {folded(text) for text in (*exercise.facts, *asked)}


def _asides() -> str:
    return "|".join(map(re.escape, (*TRAIN.only, *TRAIN.in_full)))


def test_evaluation_asks_for_the_needles_of_the_results_on_record(tmp_path) -> None:
    grid = NeedleGrid("story", contexts=(600,), num_depths=2)
    reader = Reader()
    record = Record.open(tmp_path / "n.json", "needle", reader.description, grid.settings())
    haystack = Haystack(["A sentence of a story."] * 400, reader)
    run_needles(grid, reader, haystack, record, lambda count: None)
    values = [record.items[f"600/0.0/{key}"]["expected"] for key in range(5)]
    assert values == ["37657", "3506955", "8526691", "7050787", "5417996"]


def test_values_of_training_have_numbers_of_every_length_and_codes_and_phrases() -> None:
    rng = random.Random(0)
    values = [draw_value(rng, TRAIN, Split.TRAIN) for _ in range(3000)]
    forms = {
        "number": r"[1-9]\d{3,11}", "hexadecimal": r"[0-9a-f]{6,16}",
        "code": r"([A-Z]{2}|\d{2,5})(-([A-Z]{2}|\d{2,5})){1,3}",
        "phrase": r"[a-z]+([ -][a-z]+){1,3}", "uuid": r"\w{8}(-\w{4}){3}-\w{12}",
    }  # fmt: skip
    found = {name: [v for v in values if re.fullmatch(form, v)] for name, form in forms.items()}
    assert min(map(len, found.values())) > 40
    assert {len(number) for number in found["number"]} == set(range(4, 13))
    few = [number for number in found["number"] if len(number) >= 7 and len(set(number)) <= 4]
    # Of numbers with digits by chance, less than one in twenty has so few different ones.
    assert len(few) > 0.2 * len(found["number"])
    assert len(values) > len(VALUES[Split.HELD_OUT])


@pytest.mark.parametrize("draw", VALUES[Split.TRAIN], ids=lambda draw: draw.__name__)
def test_a_look_alike_has_the_form_of_its_value_and_is_another(draw) -> None:
    shared = 0
    for seed in range(200):
        rng = random.Random(seed)
        value = draw(rng, TRAIN)
        other = look_alike(rng, TRAIN, value, draw)
        assert other != value
        if any(map(str.isdigit, value)):
            assert re.sub(r"\d", "0", other) == re.sub(r"\d", "0", value)
            shared += other[0] == value[0]
    assert shared > 100 or not any(map(str.isdigit, value))


def test_one_needle_among_others_that_look_like_it_is_asked_for() -> None:
    for seed in range(100):
        exercise = needle_among_alike(random.Random(seed), num_alike=5)
        (turn,) = exercise.turns
        (value,) = turn.values
        assert len(exercise.facts) == len(exercise.keys) == 6
        assert sum(value in fact for fact in exercise.facts) >= 1
        asked = [key for key in exercise.keys if key in turn.question]
        assert any(key in fact and value in fact for key in asked for fact in exercise.facts)


def test_an_answer_is_the_value_alone_only_where_the_question_says_so() -> None:
    alone, full = 0, 0
    for seed in range(300):
        (turn,) = KINDS["needle"](random.Random(seed)).turns
        short = turn.question.endswith(TRAIN.only)
        assert (turn.answer == turn.values[0]) == short
        alone, full = alone + short, full + turn.question.endswith(TRAIN.in_full)
    assert 40 < alone < 120
    assert full > 30


def test_no_text_has_two_values_for_what_is_asked(tokenizer, writer) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        exercises = writer._exercises(rng, 65_536)
        assert sum(len(exercise.keys) for exercise in exercises) == len(
            {key for exercise in exercises for key in exercise.keys}
        )


def test_long_texts_hold_many_facts_most_of_them_far_from_the_questions(tokenizer, writer) -> None:
    depths, turns = [], []
    mark = tokenizer.encode("<|im_start|>assistant", add_special=False)[0]
    known = set(make_corpus(tokenizer).sources["story"].tolist())
    for seed in range(4):
        sequence = writer.chat(random.Random(seed), 32_768)
        body = sequence.tokens[sequence.kinds == TEXT]
        facts = [at / len(body) for at, token in enumerate(body) if int(token) not in known]
        depths += facts
        turns.append((sequence.tokens[sequence.kinds != ANSWER] == mark).sum())
    assert min(turns) >= 11
    assert sum(0.03 <= depth <= 0.5 for depth in depths) > 0.6 * len(depths)
