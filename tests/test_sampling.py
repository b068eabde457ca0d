"""Sampling ops: kept sets against a sort, noise against statistics, penalties in plain Python."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.kernels.reference import (
    add_bias,
    apply_penalties,
    gumbel_noise,
    sample,
    token_logprobs,
)
from nsa_serve.kernels.shapes import SamplingTensors


def settings_of(
    rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, steps=None
) -> SamplingTensors:
    """Settings of ``rows`` rows; scalars are the same for all."""

    def column(value, dtype):
        return torch.as_tensor(value).expand(rows).to(dtype).clone()

    tensors = SamplingTensors(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seeds=torch.arange(rows) if seeds is None else column(seeds, torch.int64),
        steps=torch.zeros(rows, dtype=torch.int64) if steps is None else column(steps, torch.int64),
        all_greedy=False,
        any_truncation=False,
    )
    truncates = (tensors.top_k > 0) | (tensors.top_p < 1) | (tensors.min_p > 0)
    return replace(
        tensors,
        all_greedy=not bool(tensors.temperature.any()),
        any_truncation=bool(truncates.any()),
    )


def kept_by_sorting(logits, *, temperature, top_k, top_p, min_p) -> set[int]:
    """The kept tokens by walking the sorted list in fp64; ties enter together."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if 0 < top_k < len(order):
        order = [token for token in order if scaled[token] >= scaled[order[top_k - 1]]]
    peak = scaled[order[0]]
    weights = {token: math.exp(scaled[token] - peak) for token in order}
    total = sum(weights.values())
    kept, mass, before = set(), 0.0, 0.0
    for at, token in enumerate(order):
        if at and scaled[token] < scaled[order[at - 1]]:
            before = mass
        if (top_p >= 1 or before < top_p * total) and weights[token] >= min_p:
            kept.add(token)
        mass += weights[token]
    return kept


def drawn_set(logits, draws, **settings) -> set[int]:
    rows = torch.tensor(logits).expand(draws, -1)
    return set(sample(rows, settings_of(draws, **settings)).tolist())


# Multiples of a quarter: ties are frequent, and no boundary falls into rounding.
quarter_logits = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=2, max_size=12)


@given(
    logits=quarter_logits,
    temperature=st.sampled_from([1.0, 2.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.07, 0.33, 0.61, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.9]),
)
def test_truncation_keeps_exactly_what_sorting_keeps(logits, temperature, top_k, top_p, min_p):
    limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = kept_by_sorting(logits, **limits)
    found = drawn_set(logits, 256, **limits)
    assert found <= kept
    # 256 draws find every token of at least a tenth of the mass (0.9^256 = 2e-12).
    weights = {token: math.exp(logits[token] / temperature) for token in kept}
    likely = {token for token in kept if weights[token] > 0.1 * sum(weights.values())}
    assert likely <= found


@pytest.mark.parametrize("limits", [{"top_p": 0.9}, {"top_k": 300}, {"min_p": 0.2}, {"top_k": 999}])
def test_rows_that_keep_more_than_the_partial_sort_holds_draw_from_all_of_it(limits):
    logits = (torch.arange(1000) * 0.37 % 1.0).tolist()  # flat: hundreds of tokens are kept
    limits = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    kept = kept_by_sorting(torch.tensor(logits).tolist(), temperature=1.0, **limits)
    found = drawn_set(logits, 4000, temperature=1.0, **limits)
    assert len(kept) > 256
    assert found <= kept
    assert len(found) > 0.9 * len(kept)


def test_rows_of_one_batch_keep_their_own_limits():
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    own = [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (1.0, 5, 1.0),
        (0.7, 0, 0.5),
        (1.0, 0, 0.99),
        (2.0, 1, 1.0),
    ]
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*own, strict=True))
    together = sample(
        logits, settings_of(6, temperature=temperature, top_k=top_k, top_p=top_p)
    ).tolist()
    for row, (t, k, p) in enumerate(own):
        alone = settings_of(1, temperature=t, top_k=k, top_p=p, seeds=row)
        assert sample(logits[row : row + 1], alone).item() == together[row]


def test_greedy_takes_the_smallest_id_of_a_tie():
    logits = torch.zeros(3, 5)
    logits[1, [2, 4]] = 1.0
    logits[2, 3] = 2.0
    assert sample(logits, settings_of(3, temperature=0.0)).tolist() == [0, 2, 3]


def chi_square(counts, probabilities, draws) -> float:
    return sum(
        (counts[token] - draws * p) ** 2 / (draws * p) for token, p in enumerate(probabilities)
    )


@pytest.mark.parametrize("across", ["seeds", "steps"])
def test_draws_over_seeds_or_steps_follow_the_softmax(across):
    draws = 20_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2])
    numbers = {"seeds": torch.tensor(7), "steps": torch.tensor(3)} | {across: torch.arange(draws)}
    tokens = sample(logits.expand(draws, -1), settings_of(draws, temperature=0.8, **numbers))
    expected = (logits / 0.8).softmax(-1).tolist()
    # 7 degrees of freedom: above 29.9 in one of 10,000 runs.
    assert chi_square(Counter(tokens.tolist()), expected, draws) < 29.9


def test_neighbouring_steps_of_one_seed_draw_independently():
    draws = 20_000
    steps = torch.arange(draws + 1)
    tokens = sample(torch.zeros(draws + 1, 4), settings_of(draws + 1, seeds=11, steps=steps))
    pairs = Counter((tokens[1:] * 4 + tokens[:-1]).tolist())
    # 15 degrees of freedom: above 44.3 in one of 10,000 runs.
    assert chi_square(pairs, [1 / 16] * 16, draws) < 44.3


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
    token=st.integers(0, 2**18),
)
def test_noise_is_a_function_of_seed_step_and_token_alone(seed, step, token):
    alone = gumbel_noise(
        torch.tensor([seed]), torch.tensor([step]), torch.tensor([[token]], dtype=torch.int32)
    )
    seeds, steps = torch.tensor([5, seed]), torch.tensor([9, step])
    among = gumbel_noise(seeds, steps, torch.tensor([[3, token, 8]]))
    assert torch.equal(alone[0, 0], among[1, 1])
    assert alone.isfinite().all()


def test_noise_bits_are_those_of_integers_modulo_two_to_the_32():
    def mix(x, key=0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = (x ^ (x >> 15)) ^ key
        x = (x * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    seed, step, token, golden = 0x1234_5678_9ABC_DEF0, 77, 49_000, 0x9E3779B9
    low, high = seed % 2**32, seed >> 32
    first = mix(step ^ mix(low ^ mix(high)))
    second = mix(
        (step + golden) % 2**32 ^ mix((high + golden) % 2**32 ^ mix((low + golden) % 2**32))
    )
    uniform = ((mix((token + first) % 2**32, second) >> 9) + 0.5) / 2**23
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([step]), torch.tensor([[token]]))
    assert noise.item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5)


@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    prompt=st.lists(st.integers(0, 5), max_size=4),
    output=st.lists(st.integers(0, 5), max_size=8),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 2)),
)
def test_penalties_are_those_of_plain_python(logits, prompt, output, weights):
    presence, frequency, repetition = weights
    expected = []
    for token, value in enumerate(logits):
        if token in prompt or token in output:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * output.count(token) + presence * (token in output)
        expected.append(value)
    counts = torch.tensor([[output.count(token) for token in range(6)]], dtype=torch.int32)
    seen = torch.tensor([[token in prompt for token in range(6)]])
    found = apply_penalties(
        torch.tensor([logits]),
        counts,
        seen,
        presence=torch.tensor([presence]),
        frequency=torch.tensor([frequency]),
        repetition=torch.tensor([repetition]),
    )
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


def test_bias_adds_and_minus_infinity_forbids():
    logits = torch.zeros(2, 4)
    rows, ids = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0])
    found = add_bias(logits, rows, ids, torch.tensor([1.5, 2.0, -math.inf]))
    assert found.tolist() == [[0, 0, 1.5, 0], [-math.inf, 0, 0, 0]]
    assert not logits.any()


def test_logprobs_are_the_log_softmax_with_ranks_from_one():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)) * 3
    tokens = torch.tensor([0, 39, 7, 12, 20])
    logprob, rank, top, ids = token_logprobs(logits, tokens, top=6)
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprob, expected[torch.arange(5), tokens])
    values, order = expected.sort(-1, descending=True)
    torch.testing.assert_close(top, values[:, :6])
    assert torch.equal(ids, order[:, :6])
    assert rank.tolist() == [order[row].tolist().index(tokens[row]) + 1 for row in range(5)]


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_of_equally_likely_tokens_the_lowest_ids_come_first_however_many_are_wanted(count):
    logits = (torch.randn(7, 40, generator=torch.Generator().manual_seed(3)) * 2).round()
    logits[0], logits[1, ::2], logits[2, ::3] = 0.0, -math.inf, -0.0
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(token_logprobs(logits, logits.argmin(-1), top=count)[3], order[:, :count])


def test_no_alternatives_are_an_empty_list():
    _, _, top, ids = token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]), top=0)
    assert top.shape == ids.shape == (2, 0)
