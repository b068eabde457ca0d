"""Words not to be said: token by token in the sampler, and from text over HTTP."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.engine.checks import check_sampling
from nsa_serve.errors import InvalidParameter
from nsa_serve.memory.layout import KVLayout
from nsa_serve.request import SamplingParams

from .runner_driver import GREEDY, BigramModel, build_driver
from .server_fakes import fake_server

VOCAB = 8
LAYOUT = KVLayout(1, 1, 4, 4, page=8, entries_per_page=4, dtype=torch.float32)


def forbidding(*words):
    return SamplingParams(temperature=0.0, bad_words=words)


def plain_walk(table, prompt, words, num_tokens):
    """Greedy text in plain Python, without the end of any of ``words``."""
    said = []
    for _ in range(num_tokens):
        scores = table[(prompt + said)[-1]].tolist()
        for *head, last in words:
            if said[len(said) - len(head) :] == head:
                scores[last] = float("-inf")
        said.append(scores.index(max(scores)))
    return said


def run(driver, row, prompt, sampling, num_tokens):
    driver.add(row, prompt, sampling)
    driver.finish_prompt(row)
    driver.generate([row], num_tokens - 1)
    return driver.rows[row].output


# One token always stays allowed, so that there is something to say.
word = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=4).map(tuple)


@given(st.lists(word, min_size=1, max_size=6, unique=True), st.integers(0, 50))
@settings(max_examples=30)
def test_no_word_is_said_and_all_else_is_as_before(words, seed):
    model = BigramModel.random(VOCAB, seed=seed)
    driver = build_driver(model, LAYOUT, vocab_size=VOCAB)
    said = run(driver, 0, [3, 5], forbidding(*words), 12)
    assert said == plain_walk(model.table, [3, 5], words, 12)


def test_others_in_the_step_and_the_rows_next_request_may_say_them():
    model = BigramModel.random(VOCAB)
    driver = build_driver(model, LAYOUT, vocab_size=VOCAB)
    free = plain_walk(model.table, [3], [], 6)
    driver.add(0, [3], forbidding((free[0],)))
    driver.add(1, [3], GREEDY)
    driver.step({0: 1, 1: 1})
    driver.generate([0, 1], 5)
    assert driver.rows[1].output == free
    assert free[0] not in driver.rows[0].output
    driver.end(0)
    assert run(driver, 0, [3], GREEDY, 6) == free


def test_a_resumed_request_remembers_what_it_has_said():
    model = BigramModel.random(VOCAB)
    free = plain_walk(model.table, [3], [], 4)
    sampling = forbidding(tuple(free))
    straight = plain_walk(model.table, [3], [free], 8)
    driver = build_driver(model, LAYOUT, vocab_size=VOCAB)
    driver.add(2, [3], sampling, output=straight[:3])
    driver.finish_prompt(2)
    driver.generate([2], 4)
    assert driver.rows[2].output == straight
    assert straight[3] != free[3]


@pytest.mark.parametrize("words", [((),), ((1, 99),), ((-1,),)])
def test_a_sequence_that_is_none_is_refused_at_the_door(words):
    with pytest.raises(InvalidParameter, match="bad_words"):
        check_sampling(SamplingParams(bad_words=words), VOCAB)


def test_words_are_encoded_with_and_without_a_space_before_them():
    async def scenario():
        async with fake_server() as server:
            assert (await server.chat(bad_words=["no", " oh", " oh"])).status_code == 200
            return server.engine.requests[0].sampling.bad_words

    assert asyncio.run(scenario()) == (tuple(b"no"), tuple(b" no"), tuple(b" oh"))
