"""The runner on CUDA: graphs, steps in flight, and memory that was measured."""

from dataclasses import replace

import pytest
import torch

from nsa_serve.config import CacheConfig, EngineConfig, GraphConfig, ModelSource, ScheduleConfig
from nsa_serve.kernels.reference import gumbel_noise, sample
from nsa_serve.kernels.shapes import NSAShape
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.config import ModelConfig, NSAConfig
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.loader import random_weights
from nsa_serve.request import SamplingParams
from nsa_serve.runner.worker import Worker

from .checkpoints import TINY_LLAMA, write_config
from .runner_driver import GREEDY, Driver, build_driver
from .test_sampling import settings_of

pytestmark = pytest.mark.gpu

NSA = NSAConfig(shape=NSAShape(num_selected=4, window=128))
CONFIG = ModelConfig("llama", 512, 256, 2, 8, 2, 64, 64, 512, max_position=4096, nsa=NSA)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    weights = random_weights(CONFIG, device=torch.device("cuda"), dtype=torch.bfloat16, seed=1)
    return Decoder(CONFIG, weights)


def driver_of(decoder: Decoder, *, use_graphs: bool, max_model_len: int = 1024) -> Driver:
    return build_driver(
        decoder,
        KVLayout.of(CONFIG, torch.bfloat16),
        vocab_size=512,
        num_blocks=128,
        max_tokens=max_model_len,
        max_model_len=max_model_len,
        device="cuda",
        use_graphs=use_graphs,
    )


def prompt_of(length: int, seed: int) -> list[int]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(512, (length,), generator=gen).tolist()


def texts(
    driver: Driver, sampling: SamplingParams, *, num_rows: int, depth: int
) -> list[list[int]]:
    """Outputs of ``num_rows`` requests, ``depth`` decode steps launched before one is awaited."""
    for row in range(num_rows):
        driver.add(row, prompt_of(30 + 97 * row, row), sampling, seed=row)
        driver.finish_prompt(row)
    flights = []
    for _ in range(24):
        flights.append(driver.launch(dict.fromkeys(range(num_rows), 1)))
        if len(flights) > depth:
            driver.apply(flights.pop(0))
    for flight in flights:
        driver.apply(flight)
    return [driver.rows[row].output for row in range(num_rows)]


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9)])
def test_steps_in_flight_give_the_text_of_steps_awaited(decoder, num_rows, sampling):
    awaited, ahead = (
        texts(driver_of(decoder, use_graphs=True), sampling, num_rows=num_rows, depth=depth)
        for depth in (0, 1)
    )
    assert awaited == ahead


def test_graphs_replay_what_an_eager_step_of_the_same_size_computes(decoder):
    # 4 rows are a graph's size: no padding, so that matrix products round alike.
    eager, replayed = (
        texts(driver_of(decoder, use_graphs=graphs), GREEDY, num_rows=4, depth=1)
        for graphs in (False, True)
    )
    assert eager == replayed


def test_a_graph_captured_at_a_short_context_serves_a_long_one(decoder):
    driver = driver_of(decoder, use_graphs=True)
    driver.add(0, prompt_of(5, 0))
    driver.finish_prompt(0)
    driver.generate([0], 2)
    driver.end(0)
    driver.add(1, prompt_of(900, 1))
    driver.finish_prompt(1)
    driver.generate([1], 20)
    eager = driver_of(decoder, use_graphs=False)
    eager.add(1, prompt_of(900, 1))
    eager.finish_prompt(1)
    eager.generate([1], 20)
    assert driver.rows[1].output == eager.rows[1].output


def test_text_goes_on_where_a_context_outgrows_its_graph(decoder):
    outputs = []
    for graphs in (True, False):
        driver = driver_of(decoder, use_graphs=graphs, max_model_len=4096)
        for row, length in enumerate((2030, 40)):
            driver.add(row, prompt_of(length, row))
            driver.finish_prompt(row)
        driver.generate([0, 1], 40)
        outputs.append([driver.rows[row].output for row in range(2)])
    assert outputs[0] == outputs[1]


def test_noise_has_the_same_bits_on_both_devices():
    seeds, steps = torch.tensor([3, -7, 2**62]), torch.tensor([0, 9, 10**6])
    ids = torch.arange(5000).unsqueeze(0)
    here = gumbel_noise(seeds, steps, ids)
    there = gumbel_noise(seeds.cuda(), steps.cuda(), ids.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.7}, {"top_k": 40}, {"min_p": 0.1}])
def test_both_devices_draw_the_same_tokens(limits):
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(4)) * 3
    settings = settings_of(64, **limits)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps")
    moved = replace(settings, **{name: getattr(settings, name).cuda() for name in names})
    assert torch.equal(sample(logits.cuda(), moved).cpu(), sample(logits, settings))


def worker_config(folder, **cache) -> EngineConfig:
    return EngineConfig(
        source=ModelSource(model=str(folder), random_weights=True, attention="nsa"),
        cache=CacheConfig(**cache),
        schedule=ScheduleConfig(max_num_seqs=2048, max_num_batched_tokens=4096),
        graph=GraphConfig(enforce_eager=True),
        device="cuda",
    )


@pytest.fixture
def folder(tmp_path):
    # 1 MiB a page: the cache is then as large as the memory lets it be.
    wide = {"num_hidden_layers": 32, "head_dim": 64, "max_position_embeddings": 8192}
    return write_config(tmp_path, {**TINY_LLAMA, **wide})


def test_the_cache_takes_the_share_of_free_memory_that_steps_leave(folder):
    torch.cuda.empty_cache()  # what earlier tests left in torch's hands would count as used
    free = torch.cuda.mem_get_info()[0]
    worker = Worker(worker_config(folder, gpu_memory_utilization=0.2))
    used = free - torch.cuda.mem_get_info()[0]
    assert worker.num_cache_bytes <= used <= 0.2 * free
    assert worker.num_cache_bytes >= 0.1 * free


def test_the_cache_takes_the_bytes_that_the_flag_names(folder):
    worker = Worker(worker_config(folder, kv_cache_memory_bytes=1 << 30))
    assert 0 <= (1 << 30) - worker.num_cache_bytes < worker.layout.bytes_per_block
