"""A worker from its configuration: what it loads, how long its cache is, what it refuses."""

import logging
from dataclasses import replace

import pytest
import torch

from nsa_serve.config import (
    GIB,
    AttentionMode,
    CacheConfig,
    DType,
    EngineConfig,
    ModelSource,
    ScheduleConfig,
)
from nsa_serve.errors import CheckpointError, ConfigError
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.config import ModelConfig, with_attention
from nsa_serve.models.loader import parameter_shapes
from nsa_serve.models.weight_stream import StreamPlan
from nsa_serve.runner import host_memory
from nsa_serve.runner.budget import check_weights, default_cpu_cache, free_bytes, size_cache
from nsa_serve.runner.worker import Worker, choose_device, token_budget
from nsa_serve.schedule.plan import RowStart, ScheduledChunk, StepPlan

from .checkpoints import TINY_LLAMA, write_checkpoint, write_config
from .runner_driver import GREEDY

CPU = torch.device("cpu")
LAYOUT = KVLayout(2, 2, 8, 8, page=16, entries_per_page=4, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY_LLAMA)


def config_of(folder, *, cache_bytes=1 << 20, max_num_seqs=4, budget=None, **source):
    source = {"dtype": DType.FLOAT32, **source}
    return EngineConfig(
        source=ModelSource(model=str(folder), **source),
        cache=CacheConfig(kv_cache_memory_bytes=cache_bytes),
        schedule=ScheduleConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        device="cpu",
    )


def first_token(worker: Worker, prompt: list[int]) -> int:
    start = RowStart(0, "r", GREEDY, 0, prompt, [], [])
    chunk = ScheduledChunk(0, "r", 0, len(prompt), prompt, [0], True)
    return worker.launch(StepPlan(0, [], [start], [chunk])).result().tokens[0].token_id


@pytest.mark.parametrize("attention", [AttentionMode.DENSE, AttentionMode.NSA])
def test_a_worker_serves_a_checkpoint_dense_or_sparse(folder, attention):
    worker = Worker(config_of(folder, attention=attention))
    assert (worker.model_config.nsa is not None) == (attention is AttentionMode.NSA)
    assert 0 <= first_token(worker, [5, 6, 7]) < worker.vocab_size == 96
    assert worker.page == 64
    assert worker.max_model_len == 512


def test_dense_and_sparse_agree_on_a_short_prompt(folder):
    workers = (Worker(config_of(folder, attention=mode)) for mode in ("dense", "nsa"))
    tokens = {first_token(worker, list(range(3, 60))) for worker in workers}
    assert len(tokens) == 1


def test_loading_reports_its_progress_to_the_end(folder):
    seen = []
    Worker(config_of(folder), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_random_weights_need_no_weights_on_disk(tmp_path):
    write_config(tmp_path, TINY_LLAMA)
    worker = Worker(config_of(tmp_path, random_weights=True))
    assert 0 <= first_token(worker, [5]) < 96


def test_the_cache_fills_the_bytes_it_was_given(folder):
    worker = Worker(config_of(folder, cache_bytes=1 << 20))
    per_block = worker.layout.bytes_per_block
    assert worker.num_blocks == (1 << 20) // per_block
    assert worker.num_cache_bytes == worker.num_blocks * per_block
    assert worker.num_cache_tokens == worker.num_blocks * 64


def test_the_cache_holds_no_more_than_all_requests_can_use(folder):
    worker = Worker(config_of(folder, cache_bytes=64 << 20, max_num_seqs=2))
    assert worker.num_blocks == 2 * 512 // 64


def test_a_context_that_the_cache_cannot_hold_is_lowered_and_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        worker = Worker(config_of(folder, cache_bytes=200_000))
    assert worker.max_model_len == worker.num_blocks * 64 < 512
    assert str(worker.max_model_len) in caplog.text


def test_an_explicit_context_that_the_cache_cannot_hold_is_refused(folder):
    with pytest.raises(ConfigError, match=r"512 tokens needs .* --max-model-len"):
        Worker(config_of(folder, cache_bytes=200_000, max_model_len=512))


def test_a_cache_without_room_for_a_page_is_refused(folder):
    with pytest.raises(ConfigError, match="enough for 0 tokens"):
        Worker(config_of(folder, cache_bytes=100))


def test_a_shorter_context_is_served(folder):
    assert Worker(config_of(folder, max_model_len=100)).max_model_len == 100


def test_a_cache_beyond_the_memory_is_refused_before_loading(folder):
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        Worker(config_of(folder, cache_bytes=1 << 60), progress=unexpected)


def unexpected(done: int, total: int) -> None:
    raise AssertionError("weights were loaded")


def test_a_model_beyond_the_memory_is_refused_before_loading(tmp_path):
    huge = {**TINY_LLAMA, "intermediate_size": 1 << 40}
    write_config(tmp_path, huge)
    with pytest.raises(ConfigError, match=r"weights will take .* GiB"):
        Worker(config_of(tmp_path, random_weights=True), progress=unexpected)


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Worker(config_of(tmp_path / "nowhere"))


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda")


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == CPU


def test_the_step_holds_a_token_of_each_request():
    cuda = torch.device("cuda", 0)
    config = EngineConfig()
    assert [token_budget(config, device) for device in (CPU, cuda)] == [2048, 8192]
    many = replace(config, schedule=ScheduleConfig(max_num_seqs=4096))
    assert token_budget(many, CPU) == 4096
    asked = replace(config, schedule=ScheduleConfig(max_num_seqs=4, max_num_batched_tokens=100))
    assert token_budget(asked, cuda) == 100


def test_the_line_when_ready_says_weights_and_cache(folder):
    line = Worker(config_of(folder, cache_bytes=1 << 20)).describe()
    assert line == "float32 on cpu, weights 0.2 MiB, cache 2,048 tokens (1.0 MiB), context 512"


def test_the_default_cpu_cache_is_a_quarter_of_the_free_memory_up_to_4_gib():
    assert default_cpu_cache(8 * GIB) == 2 * GIB
    assert default_cpu_cache(400 * GIB) == 4 * GIB


def test_free_memory_is_a_positive_number_of_bytes():
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


@pytest.mark.parametrize(("spare", "blocks", "length"), [(0, 5, 80), (-1, 4, 64), (10**9, 15, 80)])
def test_the_length_falls_only_where_one_request_does_not_fit(spare, blocks, length):
    size = size_cache(
        5 * LAYOUT.bytes_per_block + spare,
        LAYOUT,
        max_model_len=80,
        max_num_seqs=3,
        is_explicit=False,
    )
    assert (size.num_blocks, size.max_model_len) == (blocks, length)


def test_weights_must_leave_something_for_the_cache():
    check_weights(9, 20, usable=10, flags="")
    with pytest.raises(ConfigError, match="raise it"):
        check_weights(10, 20, usable=10, flags="raise it")


@pytest.mark.parametrize("flag", ["--cpu-offload-bytes", "--kv-host-memory-bytes"])
@pytest.mark.parametrize("refusal", ["is refused", "exceeds the host's free memory"])
def test_host_memory_that_a_gpu_can_not_have_is_refused_by_its_flag(monkeypatch, flag, refusal):
    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_memory, "PinnedMemory", refuse)
    free = GIB if refusal == "is refused" else 1 << 10
    monkeypatch.setattr(host_memory, "free_bytes", lambda device: free)
    config = EngineConfig.from_flags(cpu_offload_bytes=1 << 20, kv_host_memory_bytes=1 << 20)
    dense = ModelConfig("llama", 96, 48, 4, 6, 2, 8, 8, 80, 512)
    model = with_attention(dense, AttentionMode.NSA)
    plan = StreamPlan.of(parameter_shapes(model), model.num_layers, torch.bfloat16, 1 << 20)
    cuda = torch.device("cuda")
    reserve = {
        "--cpu-offload-bytes": lambda: host_memory.reserve_weights(plan),
        "--kv-host-memory-bytes": lambda: host_memory.reserve_pages(config, model, LAYOUT, cuda),
    }
    with pytest.raises(ConfigError, match=f"{flag} .*{refusal}"):
        reserve[flag]()
