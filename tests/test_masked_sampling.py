"""Masks of allowed tokens: their bits, and sampling behind them with every other setting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.kernels.dispatch import ops_for
from nsa_serve.memory.layout import KVLayout
from nsa_serve.request import JSON_OBJECT, SamplingParams
from nsa_serve.runner.model_runner import NO_FINITE_LOGITS

from .runner_driver import GREEDY, BigramModel, build_driver

VOCAB = 70  # three words, the last one not full
EOS = 7
LAYOUT = KVLayout(1, 1, 4, 4, page=8, entries_per_page=4, dtype=torch.float32)


def pack(token_ids, vocab_size=VOCAB):
    bits = np.zeros(32 * -(-vocab_size // 32), np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@given(st.integers(1, 100), st.integers(1, 4), st.integers(0, 1 << 20))
def test_what_has_no_bit_is_forbidden_and_all_else_is_as_it_was(vocab_size, rows, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((rows, vocab_size), np.float32))
    kept = rng.random((rows, vocab_size)) < 0.4
    packed = b"".join(pack(np.flatnonzero(row), vocab_size) for row in kept)
    words = torch.from_numpy(np.frombuffer(packed, np.int32).reshape(rows, -1).copy())
    masked = ops_for("cpu").mask_logits(logits, words)
    assert torch.equal(masked, torch.where(torch.from_numpy(kept), logits, -torch.inf))


def driver_of(seed=0):
    model = BigramModel.random(VOCAB, seed=seed)
    return build_driver(model, LAYOUT, vocab_size=VOCAB, eos_token_ids=(EOS,))


def say(driver, row, sampling, mask, count, *, prompt=(3, 5), seed=0):
    """The first ``count`` tokens of a request that may say those of ``mask`` alone."""
    driver.add(row, prompt, sampling, seed=seed)
    if mask is not None:
        driver.masks[row] = pack(mask)
    driver.finish_prompt(row)
    driver.generate([row], count - 1)
    return driver.rows[row].output


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.7, "presence_penalty": 0.5},
    {"temperature": 1.0, "frequency_penalty": 1.5},
    {"temperature": 0.0, "logit_bias": {4: 6.0, 9: 90.0}},
    {"temperature": 0.0, "bad_words": ((6,), (4, 11))},
]


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_masked_request_is_one_whose_other_tokens_are_biased_away(fields, seed):
    mask = {4, 6, 11, 31, 32, 63, 64, 69}
    masked = say(driver_of(seed), 0, SamplingParams(**fields), mask, 12, seed=seed)
    model = BigramModel.random(VOCAB, seed=seed)
    model.table[:, sorted(set(range(VOCAB)) - mask)] = -torch.inf
    plain = build_driver(model, LAYOUT, vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert masked == say(plain, 0, SamplingParams(**fields), None, 12, seed=seed)
    assert set(masked) <= mask


def test_masks_of_some_rows_leave_the_others_alone():
    driver = driver_of()
    rows = {0: {4, 9}, 1: None, 2: {64}, 5: None, 6: {1, 2, 3}}
    alone = {row: say(driver_of(), 0, GREEDY, mask, 6) for row, mask in rows.items()}
    for row, mask in rows.items():
        driver.add(row, [3, 5])
        if mask is not None:
            driver.masks[row] = pack(mask)
    driver.step(dict.fromkeys(rows, 2))
    driver.generate(list(rows), 5)
    assert {row: driver.rows[row].output for row in rows} == alone


def test_forty_masks_in_a_step_are_each_their_own_rows():
    driver = build_driver(
        BigramModel.random(VOCAB), LAYOUT, vocab_size=VOCAB, max_rows=40, num_blocks=80
    )
    for row in range(40):
        driver.add(row, [3, 5])
        driver.masks[row] = pack({row, 69 - row})
    driver.step(dict.fromkeys(range(40), 2))
    scores = driver.runner.model.model.table[5]
    for row in range(40):
        best = max((row, 69 - row), key=lambda token: float(scores[token]))
        assert driver.rows[row].output == [best]


def test_a_mask_outranks_edits_that_forbid_all_it_allows():
    sampling = SamplingParams(temperature=0.0, min_tokens=9, bad_words=((8,),), grammar=JSON_OBJECT)
    assert say(driver_of(), 0, sampling, {EOS, 8}, 1)[0] in {EOS, 8}
    # One that is left is taken.
    assert say(driver_of(), 0, sampling, {EOS, 8, 9}, 3) == [9, 9, 9]


def test_an_ignored_end_token_is_said_only_where_nothing_else_is_allowed():
    ignoring = SamplingParams(
        temperature=0.0, ignore_eos=True, grammar=JSON_OBJECT, logit_bias={EOS: 100.0}
    )
    assert say(driver_of(), 0, ignoring, {EOS, 9}, 2) == [9, 9]
    assert say(driver_of(), 0, ignoring, {EOS}, 1) == [EOS]


def test_log_probabilities_are_the_models_own():
    driver = driver_of()
    driver.add(0, [3, 5], SamplingParams(temperature=0.0, logprobs=2))
    driver.masks[0] = pack({9})
    (token,) = driver.finish_prompt(0).tokens
    logprobs = driver.runner.model.model.table[5].log_softmax(0)
    assert token.logprob.token_id == 9
    assert token.logprob.logprob == pytest.approx(float(logprobs[9]), abs=1e-5)
    assert [token_id for token_id, _ in token.logprob.top] == logprobs.topk(2).indices.tolist()


def test_logits_that_are_nan_stay_an_error_behind_a_mask():
    driver = driver_of()
    driver.runner.model.model.table[5] = torch.nan
    driver.add(0, [3, 5])
    driver.masks[0] = pack({9, 10})
    (token,) = driver.finish_prompt(0).tokens
    assert token.error == NO_FINITE_LOGITS
