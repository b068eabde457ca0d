"""Each request's own settings, step by step, over a model whose logits are a fixed table."""

import math
from collections import Counter

import pytest
import torch

from nsa_serve.memory.layout import KVLayout
from nsa_serve.request import SamplingParams
from nsa_serve.runner.model_runner import NO_FINITE_LOGITS

from .runner_driver import GREEDY, BigramModel, Driver, build_driver

VOCAB = 24
LAYOUT = KVLayout(1, 1, 4, 4, page=8, entries_per_page=4, dtype=torch.float32)


def driver_of(model=None, **options) -> Driver:
    return build_driver(model or BigramModel.random(VOCAB), LAYOUT, vocab_size=VOCAB, **options)


def table_of(driver) -> torch.Tensor:
    return driver.runner.model.model.table


def run(driver, requests, num_tokens) -> dict[int, list[int]]:
    """Outputs of {row: (prompt, sampling, seed)} run together."""
    for row, (prompt, sampling, seed) in requests.items():
        driver.add(row, prompt, sampling, seed=seed)
        driver.finish_prompt(row)
    for _ in range(num_tokens - 1):
        driver.step(dict.fromkeys(requests, 1))
    return {row: driver.rows[row].output for row in requests}


def greedy_walk(table, token, num_tokens) -> list[int]:
    walk = []
    for _ in range(num_tokens):
        token = int(table[token].argmax())
        walk.append(token)
    return walk


def test_greedy_text_follows_the_model():
    driver = driver_of()
    outputs = run(driver, {0: ([3, 5], GREEDY, 0), 4: ([7], GREEDY, 0)}, 9)
    assert outputs[0] == greedy_walk(table_of(driver), 5, 9)
    assert outputs[4] == greedy_walk(table_of(driver), 7, 9)


def test_tokens_known_to_the_device_alone_feed_the_next_step():
    driver = driver_of()
    driver.add(2, [3, 5])
    driver.add(5, [1])
    pending = [driver.launch({2: 2, 5: 1}), driver.launch({5: 1, 2: 1}), driver.launch({2: 1})]
    for step in pending:
        driver.apply(step)
    assert driver.rows[2].output == greedy_walk(table_of(driver), 5, 3)
    assert driver.rows[5].output == greedy_walk(table_of(driver), 1, 2)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.8}, {"top_k": 6, "min_p": 0.01}])
def test_the_same_seed_gives_the_same_text_whatever_else_runs(limits):
    sampling = SamplingParams(temperature=1.3, **limits)
    alone = run(driver_of(), {0: ([3], sampling, 42)}, 12)[0]
    others = {
        row: ([row], SamplingParams(temperature=1.0 + row, frequency_penalty=0.3), row)
        for row in (0, 1, 3, 4)
    }
    together = run(driver_of(), others | {6: ([3], sampling, 42)}, 12)[6]
    other_seed = run(driver_of(), {0: ([3], sampling, 43)}, 12)[0]
    assert alone == together
    assert alone != other_seed


def test_seeds_beyond_64_bits_and_below_zero_are_taken():
    sampling = SamplingParams(temperature=1.0)
    for seed in (-1, 2**63, 2**64 - 1):
        assert len(run(driver_of(), {0: ([3], sampling, seed)}, 2)[0]) == 2


def test_a_resumed_request_goes_on_as_if_never_preempted():
    sampling = SamplingParams(temperature=1.0, presence_penalty=0.7, repetition_penalty=1.2)
    straight = run(driver_of(), {0: ([3, 4], sampling, 9)}, 10)[0]
    driver = driver_of()
    before = run(driver, {0: ([3, 4], sampling, 9)}, 4)[0]
    driver.end(0)
    driver.add(5, [3, 4], sampling, seed=9, output=before)
    driver.finish_prompt(5)
    driver.generate([5], 5)
    assert driver.rows[5].output == straight


def penalised_walk(table, prompt, sampling, num_tokens) -> list[int]:
    """Greedy text under penalties, in plain Python."""
    output: list[int] = []
    for _ in range(num_tokens):
        scores = table[(prompt + output)[-1]].tolist()
        counts = Counter(output)
        for token in set(prompt) | set(output):
            factor = sampling.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        for token, count in counts.items():
            scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        output.append(scores.index(max(scores)))
    return output


@pytest.mark.parametrize(
    "penalty",
    [
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.6},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.2, "presence_penalty": 1.5},
    ],
)
def test_penalties_follow_prompt_and_output_as_plain_python_counts_them(penalty):
    sampling = SamplingParams(temperature=0.0, **penalty)
    driver = driver_of()
    prompts = {0: [3, 5, 3], 1: [9, 9], 7: [2]}
    requests = {row: (prompt, sampling, 0) for row, prompt in prompts.items()}
    outputs = run(driver, requests | {3: ([4], GREEDY, 0)}, 15)
    for row, prompt in prompts.items():
        assert outputs[row] == penalised_walk(table_of(driver), prompt, sampling, 15)
    assert outputs[3] == greedy_walk(table_of(driver), 4, 15)


def test_a_row_given_to_the_next_request_starts_without_penalties_or_bias():
    driver = driver_of()
    heavy = SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias={3: 50.0})
    run(driver, {0: ([3], heavy, 0)}, 5)
    driver.end(0)
    assert run(driver, {0: ([7], GREEDY, 0)}, 6)[0] == greedy_walk(table_of(driver), 7, 6)


def test_bias_of_one_request_leaves_the_others_alone():
    driver = driver_of()
    biased = SamplingParams(temperature=0.0, logit_bias={11: 100.0, 2: -100.0})
    outputs = run(driver, {0: ([3], biased, 0), 1: ([3], GREEDY, 0)}, 4)
    assert outputs[0] == [11] * 4
    assert outputs[1] == greedy_walk(table_of(driver), 3, 4)


@pytest.mark.parametrize(
    ("ignore_eos", "text"), [(False, [9, 9, 9, 2, 2]), (True, [2, 2, 2, 2, 2])]
)
def test_stop_tokens_are_forbidden_until_min_tokens(ignore_eos, text):
    table = torch.zeros(VOCAB, VOCAB)
    table[:, 2], table[:, 6], table[:, 9] = 3.0, 2.0, 1.0
    driver = driver_of(BigramModel(table), eos_token_ids=(2,))
    sampling = SamplingParams(
        temperature=0.0, min_tokens=3, stop_token_ids=(6,), ignore_eos=ignore_eos
    )
    assert run(driver, {0: ([1], sampling, 0)}, 5)[0] == text


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_fail_their_own_request_alone(broken, temperature):
    table = BigramModel.random(VOCAB).table
    table[8, :] = broken
    driver = driver_of(BigramModel(table))
    sampling = SamplingParams(temperature=temperature, top_p=0.9)
    driver.add(0, [8], sampling)
    driver.add(1, [3], GREEDY)
    broken_token, sound_token = driver.step({0: 1, 1: 1}).tokens
    assert broken_token.error == NO_FINITE_LOGITS
    assert sound_token.error is None
    assert sound_token.token_id == int(table[3].argmax())


def test_one_nan_among_the_logits_fails_the_request():
    table = BigramModel.random(VOCAB).table
    table[8, 20] = math.nan
    driver = driver_of(BigramModel(table))
    driver.add(0, [8], SamplingParams(temperature=1.0, top_k=2))
    assert driver.step({0: 1}).tokens[0].error == NO_FINITE_LOGITS


def test_logprobs_are_of_the_models_own_logits_whatever_shapes_the_draw():
    driver = driver_of()
    shaped = SamplingParams(
        temperature=2.0, top_k=3, presence_penalty=1.0, logit_bias={4: 1.0}, logprobs=2
    )
    driver.add(0, [3], shaped, seed=5)
    driver.add(1, [6], SamplingParams(temperature=0.0, logprobs=0))
    driver.add(2, [6], GREEDY)
    tokens = driver.step({0: 1, 1: 1, 2: 1}).tokens
    expected = table_of(driver)[[3, 6]].log_softmax(-1)
    drawn = tokens[0].logprob
    assert drawn.token_id == tokens[0].token_id
    assert drawn.logprob == pytest.approx(expected[0, drawn.token_id].item(), abs=1e-5)
    assert drawn.rank == 1 + int((expected[0] > expected[0, drawn.token_id]).sum())
    best = expected[0].topk(2)
    assert [token for token, _ in drawn.top] == best.indices.tolist()
    assert [value for _, value in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (tokens[1].logprob.rank, tokens[1].logprob.top) == (1, [])
    assert tokens[2].logprob is None


@pytest.mark.parametrize("splits", [(), (1,), (4, 2), (7,), (6, 1)])
def test_prompt_logprobs_cover_the_prompt_however_it_is_cut(splits):
    prompt = [3, 9, 1, 1, 20, 4, 17, 6]
    driver = driver_of()
    driver.add(1, [5, 6], GREEDY)
    driver.add(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=2))
    results = [driver.step({0: split}) for split in splits]
    results.append(driver.step({1: 2, 0: len(prompt) - sum(splits)}))
    results.append(driver.step({0: 1}))
    found = {}
    for part in (part for result in results for part in result.prompt_logprobs):
        assert part.request_id == "r0"
        found |= {part.start + at: entry for at, entry in enumerate(part.entries)}
    assert sorted(found) == list(range(1, len(prompt)))
    expected = table_of(driver).log_softmax(-1)
    for position, entry in found.items():
        row = expected[prompt[position - 1]]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(row[prompt[position]].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_resumed_request_does_not_repeat_its_prompt_logprobs():
    driver = driver_of()
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
    driver.add(0, [3, 9], sampling, output=[7])
    assert driver.step({0: 3}).prompt_logprobs == []


def test_a_plan_that_only_frees_rows_gives_an_empty_result():
    driver = driver_of()
    driver.add(0, [3], SamplingParams(presence_penalty=1.0))
    driver.step({0: 1})
    driver.end(0)
    result = driver.step({})
    assert (result.tokens, result.prompt_logprobs) == ([], [])
    assert 0 not in driver.runner.sampler.penalties


def test_a_chunk_that_does_not_reach_the_end_samples_nothing():
    driver = driver_of()
    driver.add(0, [3, 4, 5])
    assert driver.step({0: 2}).tokens == []
    assert driver.runner.model.steps[-1].shape == (0, VOCAB)
