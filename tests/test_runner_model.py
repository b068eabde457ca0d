"""The runner with small real models: however the work is cut and mixed, the logits are the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.kernels.shapes import CompressKind, NSAShape
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.config import ModelConfig, NSAConfig, PhiConfig
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.loader import random_weights
from nsa_serve.request import SamplingParams
from nsa_serve.runner.graphs import padded_sizes
from nsa_serve.runner.profile import heaviest_plan

from .runner_driver import Driver, build_driver

SHAPE = NSAShape(compress_len=8, compress_stride=4, page=16, num_selected=4, window=24)
DENSE = ModelConfig("llama", 61, 24, 2, 6, 2, 8, 8, 32, max_position=320)
UNTRAINED = replace(DENSE, nsa=NSAConfig(shape=SHAPE))
TRAINED = replace(
    DENSE,
    family="nsa_serve",
    head_dim_v=4,
    nsa=NSAConfig(
        shape=SHAPE,
        phi_k=PhiConfig(CompressKind.LINEAR, position=True),
        phi_v=PhiConfig(CompressKind.WEIGHTED),
        before_rope=True,
        gated=True,
    ),
)
CONFIGS = {"dense": DENSE, "untrained": UNTRAINED, "trained": TRAINED}
LENGTHS = (1, 7, 8, 15, 16, 17, 25, 63, 64, 65, 100)


def build_decoder(config: ModelConfig) -> Decoder:
    weights = random_weights(config, device=torch.device("cpu"), dtype=torch.float32, seed=1)
    # Large enough scores that attention is sharp and tokens differ.
    return Decoder(config, {name: w * 2 if w.ndim > 1 else w for name, w in weights.items()})


DECODERS = {name: build_decoder(config) for name, config in CONFIGS.items()}


@pytest.fixture(params=DECODERS)
def decoder(request) -> Decoder:
    return DECODERS[request.param]


def driver_of(decoder: Decoder, **options) -> Driver:
    layout = KVLayout.of(decoder.config, torch.float32)
    vocab_size = decoder.config.vocab_size
    return build_driver(decoder, layout, vocab_size=vocab_size, max_model_len=320, **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(61, (length,), generator=gen).tolist()


def take_logits(driver: Driver) -> torch.Tensor:
    """Logits of all samples since the last call, in the order they were made."""
    steps = driver.runner.model.steps
    logits = torch.cat(steps)
    steps.clear()
    return logits


def straight(
    decoder: Decoder, prompt: list[int], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """(greedy tokens, logits of each) of a prompt alone, in one chunk."""
    driver = driver_of(decoder)
    driver.add(0, prompt)
    driver.finish_prompt(0)
    driver.generate([0], num_tokens - 1)
    return driver.rows[0].output, take_logits(driver)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_of_any_size_give_the_logits_of_one(decoder, length):
    prompt = prompt_of(length)
    text, logits = straight(decoder, prompt, 4)
    for seed in range(3):
        gen = torch.Generator().manual_seed(seed)
        cuts = torch.randint(1, length + 1, (4,), generator=gen).unique().tolist()
        splits = [b - a for a, b in zip([0, *cuts], cuts, strict=False) if b < length]
        driver = driver_of(decoder)
        driver.add(3, prompt)
        driver.finish_prompt(3, *splits)
        driver.generate([3], 3)
        assert driver.rows[3].output == text
        assert_same(take_logits(driver), logits)


@pytest.mark.parametrize("length", LENGTHS[2:])
def test_decoding_the_last_tokens_gives_the_logits_of_a_prefill(decoder, length):
    prompt = prompt_of(length)
    _, logits = straight(decoder, prompt, 1)
    driver = driver_of(decoder)
    driver.add(0, prompt)
    driver.finish_prompt(0, length - 5, 1, 1, 1, 1)
    assert_same(take_logits(driver), logits)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("name", CONFIGS)
def test_requests_run_together_give_the_text_of_each_alone(name, lengths, order):
    decoder = DECODERS[name]
    driver = driver_of(decoder)
    prompts = {row: prompt_of(length, seed=row) for row, length in enumerate(lengths)}
    waiting = dict(prompts)
    while any(len(row.output) < 3 for row in driver.rows.values()) or waiting:
        if waiting and order.random() < 0.6:
            row, prompt = waiting.popitem()
            driver.add(row, prompt)
        counts = {
            row: order.randint(1, len(state.tokens) - state.computed)
            for row, state in driver.rows.items()
        }
        if counts:
            driver.step(counts)
    for row, prompt in prompts.items():
        assert driver.rows[row].output[:3] == straight(decoder, prompt, 3)[0]


@pytest.mark.parametrize("pages", [1, 2, 4])
def test_a_prefix_hit_gives_the_logits_of_a_miss(decoder, pages):
    shared = prompt_of(pages * driver_of(decoder).runner.pool.layout.page)
    first, second = shared + prompt_of(9, seed=5), shared + prompt_of(21, seed=6)
    driver = driver_of(decoder)
    driver.add(0, first)
    driver.finish_prompt(0)
    hits = driver.end(0, keep_blocks=True).blocks[:pages]
    before = page_bytes(driver, hits)
    take_logits(driver)
    driver.add(1, second, hits=hits)
    driver.finish_prompt(1, 4)
    driver.generate([1], 3)
    text, logits = straight(decoder, second, 4)
    assert driver.rows[1].output == text
    assert_same(take_logits(driver), logits)
    assert all(torch.equal(a, b) for a, b in zip(before, page_bytes(driver, hits), strict=True))


def page_bytes(driver: Driver, blocks: list[int]) -> list[torch.Tensor]:
    """Raw and compressed contents of blocks, as bits: NaN where nobody wrote."""
    pool = driver.runner.pool
    views = [*pool.kv, *(pool.compressed or [])]
    return [half[blocks].view(torch.int32) for view in views for half in (view.k, view.v)]


@pytest.mark.parametrize("name", ["untrained", "trained"])
def test_compressed_entries_do_not_depend_on_hits_or_chunks(name):
    decoder = DECODERS[name]
    prompt = prompt_of(100)

    def entries(*splits, hit=0):
        driver = driver_of(decoder)
        if hit:
            driver.add(1, prompt[: hit * 16 + 3])
            driver.finish_prompt(1)
            hits = driver.end(1, keep_blocks=True).blocks[:hit]
            driver.add(0, prompt, hits=hits)
        else:
            driver.add(0, prompt)
        driver.finish_prompt(0, *splits)
        blocks = driver.rows[0].blocks
        compressed = driver.runner.pool.compressed
        return torch.cat([view.k[blocks].flatten() for view in compressed])

    whole = entries()
    for other in (entries(5, 40), entries(hit=3), entries(1, hit=5)):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("after", [1, 4, 14])
def test_a_preempted_request_resumes_with_the_same_text(decoder, after):
    prompt = prompt_of(30)
    text, _ = straight(decoder, prompt, 18)
    driver = driver_of(decoder)
    driver.add(0, prompt)
    driver.finish_prompt(0)
    driver.generate([0], after - 1)
    gone = driver.end(0)
    driver.runner.pool.poison()
    driver.add(6, prompt, output=gone.output)
    driver.finish_prompt(6, 17)
    driver.generate([6], 17 - after)
    assert driver.rows[6].output == text


class EagerGraphs:
    """Runs a graph's step, padded and with whole tables, without capturing it."""

    def __init__(self, runner) -> None:
        self.runner = runner
        self.num_runs = 0

    def size_for(self, num_rows):
        return next(size for size in padded_sizes(8) if size >= num_rows)

    def run(self, fields, shape):
        self.num_runs += 1
        shape = replace(shape, from_device=True)
        buffers = self.runner.buffers
        inputs = buffers.inputs(fields, shape, reach=buffers.max_model_len)
        return self.runner._forward_all(inputs)


@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_padding_and_whole_tables_change_no_request(decoder, num_rows):
    texts = []
    for padded in (False, True):
        driver = driver_of(decoder)
        if padded:
            driver.runner.graphs = EagerGraphs(driver.runner)
        for row in range(num_rows):
            driver.add(row, prompt_of(20 + 13 * row, seed=row))
            driver.finish_prompt(row)
        flights = [driver.launch(dict.fromkeys(range(num_rows), 1)) for _ in range(6)]
        for flight in flights:
            driver.apply(flight)
        texts.append([driver.rows[row].output for row in range(num_rows)])
    assert driver.runner.graphs.num_runs == 6
    assert texts[0] == texts[1]


def test_only_the_rows_that_sample_get_logits(decoder):
    driver = driver_of(decoder)
    driver.add(0, prompt_of(40))
    driver.add(1, prompt_of(9))
    driver.step({0: 30, 1: 9})
    assert take_logits(driver).shape == (1, 61)


def test_prompt_logprobs_are_the_models_own_in_chunks_of_any_size(decoder):
    prompt = prompt_of(150)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    found = []
    for splits in ((), (7, 50, 1)):
        driver = driver_of(decoder)
        driver.add(0, prompt, sampling)
        results = [driver.step({0: split}) for split in splits]
        results.append(driver.finish_prompt(0))
        pieces = [piece for result in results for piece in result.prompt_logprobs]
        found.append([entry.logprob for piece in pieces for entry in piece.entries])
    assert len(found[0]) == 149
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 64), (8, 64), (8, 8), (4, 400)])
def test_the_heaviest_plan_fills_the_budget_and_runs_over_memory_nobody_wrote(
    decoder, max_rows, max_tokens
):
    driver = driver_of(decoder, num_blocks=4, max_rows=max_rows, max_tokens=max_tokens)
    plan = heaviest_plan(
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_model_len=320,
        page=driver.runner.pool.layout.page,
        num_blocks=4,
    )
    assert plan.num_tokens == min(max_tokens, 320 + max_rows - 1)
    assert len(driver.runner.launch(plan).result().tokens) == max_rows
