"""Chat whose answers are known to be right: numbers add up, nothing held out is asked."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from nsa_serve.train.batches import BatchSource
from nsa_serve.train.dialogues import Dialogues
from nsa_serve.train.held_out_prompts import HELD_OUT_PROMPTS, is_held_out
from nsa_serve.train.known_answers import draw_known, listed_questions
from nsa_serve.train.known_facts import known_facts
from nsa_serve.train.prompt_words import WORDS
from nsa_serve.train.prompts import draw_prompts
from nsa_serve.train.sequences import ANSWER, UNUSED
from nsa_serve.train.tasks import Turn

from .tiny_training import load_tokenizer, make_source

NUMBER = r"(\d+)"
# What one of each is in the smallest unit of its kind, from no table of ours.
METRES = {"kilometers": 1000, "meters": 1, "centimeters": Fraction(1, 100)}
METRES |= {"millimeters": Fraction(1, 1000)}
SECONDS = {"days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
YEARS = {"centuries": 100, "decades": 10, "years": 1, "months": Fraction(1, 12)}
FEET = {"miles": 5280, "yards": 3, "feet": 1, "inches": Fraction(1, 12)}
GRAMS = {"tonnes": 1_000_000, "kilograms": 1000, "grams": 1}
SCALES = (METRES, SECONDS, YEARS, FEET, GRAMS)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def drawn() -> list[Turn]:
    rng = random.Random(f"known {random.randrange(10**9)}")
    return [draw_known(rng) for _ in range(20_000)]


def test_nothing_by_which_chat_is_judged_is_asked(drawn):
    assert not {turn.question for turn in drawn} & set(HELD_OUT_PROMPTS)
    assert not any(is_held_out(turn.question) for turn in {t.question: t for t in drawn}.values())
    # Nor in other words.
    assert all(map(is_held_out, ("7 + 5 = ?", "Add 5 and 7.", "How many meters are 2 kilometers?")))


def test_what_would_be_held_out_is_drawn_again(monkeypatch):
    turns = iter((("What is gravity?", "It pulls."), ("What is a tide?", "the sea rises.")))
    monkeypatch.setattr("nsa_serve.train.known_answers._KINDS", (lambda rng: next(turns),))
    assert draw_known(random.Random(0)) == Turn(
        "What is a tide?", "The sea rises.", ("The sea rises.",)
    )


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (rf"{NUMBER} (?:plus|\+) {NUMBER} (?:is|=) {NUMBER}\.?", lambda a, b: a + b),
        (rf"{NUMBER} (?:minus|-) {NUMBER} (?:is|=) {NUMBER}\.?", lambda a, b: a - b),
        (rf"{NUMBER} (?:times|x) {NUMBER} (?:is|=) {NUMBER}\.?", lambda a, b: a * b),
        (rf"{NUMBER} (?:divided by|/) {NUMBER} (?:is|=) {NUMBER}\.?", lambda a, b: a // b),
        (rf"{NUMBER} (square)d is {NUMBER}\.", lambda a, _: a * a),
        (rf"(Half) of {NUMBER} is {NUMBER}\.", lambda _, b: b // 2),
        (rf"(Double) {NUMBER} is {NUMBER}\.", lambda _, b: 2 * b),
    ],
)
def test_sums_are_right(drawn, answer: str, result: Callable[[int, int], int]):
    found = [(turn, re.fullmatch(answer, turn.answer)) for turn in drawn]
    matched = [(turn, match) for turn, match in found if match]
    assert len({turn.question for turn, _ in matched}) >= 18
    for turn, match in matched:
        a, b, c = (int(part) if part.isdigit() else 0 for part in match.groups())
        assert result(a, b) == c, turn
        asked = {int(part) for part in re.findall(NUMBER, turn.question)}
        assert asked <= {a, b}, turn


def test_roots_comparisons_and_parities_are_right(drawn):
    roots = [t for t in drawn if "square root" in t.question]
    larger = [t for t in drawn if t.question.startswith("Which is bigger")]
    parities = [t for t in drawn if t.question.endswith("an even number?") and "Is " in t.question]
    assert min(len(roots), len(larger), len(parities)) > 100
    for turn in roots:
        square, root, *_ = map(int, re.findall(NUMBER, turn.answer))
        assert root * root == square
        assert str(square) in turn.question
    for turn in larger:
        high, low = map(int, re.findall(NUMBER, turn.answer))
        assert high > low
        assert {high, low} == set(map(int, re.findall(NUMBER, turn.question)))
    for turn in parities:
        number = re.findall(NUMBER, turn.question)[0]
        assert turn.answer.startswith("Yes" if number[-1] in "02468" else "No")


def test_conversions_are_right(drawn):
    checked = 0
    for turn in drawn:
        found = re.search(rf"{NUMBER} (\w+) are {NUMBER} (\w+)\.$", turn.answer)
        for scale in SCALES:
            if found and {found[2], found[4]} <= scale.keys():
                assert int(found[1]) * scale[found[2]] == int(found[3]) * scale[found[4]], turn
                checked += 1
    assert checked > 200


def test_a_sentence_changes_its_verb_alone(drawn):
    changed = [t for t in drawn if re.search("past tense|grammar|sentence:|mistake:", t.question)]
    changed = [t for t in changed if t.question.endswith('."')]
    assert len(changed) > 500
    for turn in changed:
        asked = turn.question.split('"')[1].split()
        given = turn.answer.strip('"').split()
        assert len(asked) == len(given)
        assert sum(a != b for a, b in zip(asked, given, strict=True)) == 1
    past = {"takes": "took", "flies": "flew", "comes": "came", "plays": "played", "has": "had"}
    told = [turn for turn in changed if "past tense" in turn.question]
    for does, did in past.items():
        found = [t for t in told if f" {does} " in t.question]
        assert found
        assert all(t.question.split('"')[1].replace(does, did) == t.answer for t in found)


def test_lists_have_as_many_members_as_were_asked_for(drawn):
    numbers = {"two": 2, "three": 3, "four": 4}
    lists = [t for t in drawn if re.match("(Name|List|Give me) (two|three|four) ", t.question)]
    lists = [t for t in lists if "synonyms" not in t.question]
    assert len(lists) > 500
    for turn in lists:
        wanted = next(n for word, n in numbers.items() if f" {word} " in turn.question)
        lines = turn.answer.split("\n")
        told = lines if len(lines) > 1 else re.split(", | and ", turn.answer)
        assert len(told) == wanted, turn


def test_rows_of_the_tables_fill_their_wordings_and_none_comes_twice():
    facts = known_facts()
    for table in facts.tables:
        subjects = [row[0] for row in table.rows]
        assert len(set(subjects)) == len(subjects)
        for row in table.rows:
            assert all(cell == cell.strip() != "" for cell in row)
            assert all(row[0] in wording.format(*row) for wording in table.questions)
            assert all(row[1] in wording.format(*row) for wording in table.answers)
    rooms = (facts.single, facts.proverbs, facts.groups, facts.translations, facts.synonyms)
    for rows in (*rooms, facts.deeds, facts.units):
        assert len({row[0] for row in rows}) == len(rows)
    # Or a question would have two answers, or a mistake would be none.
    opposites = [word for pair in facts.opposites for word in pair]
    assert len(set(opposites)) == len(opposites)
    assert all(len({*deed}) == len(deed) for deed in facts.deeds)
    for _, *members in facts.groups:
        assert len(set(members)) == len(members) >= 4


def test_no_row_is_held_out_and_never_asked_for():
    facts = known_facts()
    asked = [
        question.format(*row)
        for table in facts.tables
        for row in table.rows
        for question in table.questions
    ]
    asked += [question for question, _ in facts.single]
    asked += [begin for begin, _ in facts.proverbs]
    asked += [f"opposite: {word}" for pair in facts.opposites for word in pair]
    asked += [f"synonym: {word}" for word, *_ in facts.synonyms]
    asked += [f"Spanish: {english}" for english, *_ in facts.translations]
    assert not list(filter(is_held_out, asked))


def test_the_base_answers_nothing_that_a_table_does(drawn):
    # Of 24 kinds that are drawn as often, the tables list 11.
    assert sum(turn.question in listed_questions() for turn in drawn) > 8000
    topics = {**WORDS, "country": ("Spain",), "noun": ("verb", "desk"), "sentence": ("It rained.",)}
    prompts = draw_prompts(0, 1000, topics)
    assert not {turn for prompt in prompts for turn in prompt.turns} & listed_questions()


def test_articles_fit_the_words_after_them(drawn):
    said = " ".join(f"{turn.question} {turn.answer}" for turn in drawn)
    assert not re.findall(r"\ba (?:[aeio]\w*|hour)\b", said, re.IGNORECASE)
    assert not re.findall(r"\ban (?!hour)[^aeiou\W]\w*", said, re.IGNORECASE)


def test_a_known_chat_is_in_the_models_own_template(tokenizer):
    writer = make_source(tokenizer).writer
    with_system = 0
    for seed in range(60):
        found = writer.known(random.Random(seed))
        text = tokenizer.decode(found.tokens.tolist(), skip_special=False)
        pairs = re.findall(
            r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n",
            text, re.DOTALL,
        )  # fmt: skip
        assert 1 <= len(pairs) <= 3
        if text.startswith("<|im_start|>system"):
            with_system += 1
            prompt = tokenizer.encode_chat([{"role": "user", "content": pairs[0][0]}])
            assert found.tokens[: len(prompt)].tolist() == prompt
        learnt = found.tokens[found.kinds == ANSWER].tolist()
        said = "".join(f"{answer}<|im_end|>" for _, answer in pairs)
        assert tokenizer.decode(learnt, skip_special=False) == said
        assert set(found.kinds.tolist()) == {UNUSED, ANSWER}
    assert 35 <= with_system <= 59  # four fifths


def test_a_share_of_chats_is_known(tokenizer):
    plain = make_source(tokenizer, num_tokens=2048)
    talk = (list(range(300, 340)), [False] * 10 + [True] * 30)
    for share in (0.0, 0.5, 1.0):
        plan = replace(plain.plan, dialogue_share=1.0, known_share=share, num_learnt=2000)
        source = BatchSource(plain.writer, plan, plain.nsa, 3, Dialogues.of([talk]))
        batches = [source.draw(index, 0.0) for index in range(4)]
        answers = np.concatenate([batch.answers.numpy() for batch in batches])
        spoken = np.concatenate([batch.spoken.numpy() for batch in batches])
        assert answers.any() == (share > 0)
        assert spoken.any() == (share < 1)
        assert not (answers & spoken).any()
