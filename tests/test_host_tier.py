"""The engine over a device tier of a few pages and a host tier, on a CPU: the same text."""

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from nsa_serve.engine.engine import OUT_OF_MEMORY, STEP_FAILED, Engine
from nsa_serve.errors import ConfigError, PromptTooLong
from nsa_serve.kernels.reference import block_copy
from nsa_serve.memory.copy_lane import SameLane
from nsa_serve.request import EngineRequest, RequestOutput, SamplingParams
from nsa_serve.schedule.scheduler import PAGE_LOST
from tests.checkpoints import (
    PHIS,
    TINY_LLAMA,
    TINY_NSA,
    gated,
    nsa_config_json,
    write_checkpoint,
    write_config,
)
from tests.tiered_engine import DEVICE, Breaking, build, make_requests, run, tiered


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = nsa_config_json(gated(PHIS["mean"]), max_position_embeddings=1024)
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), config)


@pytest.fixture(scope="module")
def resident(folder: Path) -> dict[str, list[int]]:
    """What an engine without a tier answers to 24 requests."""
    return run(build(folder), make_requests(24, seed=1))


def test_text_is_the_same_with_the_tier_and_without_under_constant_spilling(
    folder: Path, resident: dict[str, list[int]]
) -> None:
    engine = tiered(folder)
    found = run(engine, make_requests(24, seed=1))
    assert found == resident
    tier = engine.stats().tier
    assert tier is not None
    assert tier.lookups > tier.hits > 0 < tier.fetched_bytes
    assert tier.prefetched > tier.prefetch_hits > 0
    worker: Any = engine._runner
    pieces = worker.layout.num_layers * worker.layout.num_kv_heads
    assert tier.prefetched_bytes == tier.prefetched * worker.layout.bytes_per_slot // pieces
    assert tier.out_bytes > 2 * DEVICE
    assert tier.in_bytes > 0
    assert tier.out_seconds > 0 < tier.stall_seconds


def test_without_runners_up_only_the_next_chunks_pages_come_early(folder: Path) -> None:
    requests = make_requests(8, seed=6)
    reports, texts = [], []
    for count in (0, 4):
        engine = tiered(folder, kv_runners_up=count)
        texts.append(run(engine, requests))
        reports.append(engine.stats().tier)
    without, with_some = reports
    assert texts[0] == texts[1]
    assert 0 < without.prefetch_hits < without.prefetched < with_some.prefetched


def test_aborts_while_pages_move_leave_the_others_alone(folder: Path) -> None:
    requests = make_requests(12, seed=2)
    aborted = frozenset(f"r{index}" for index in range(0, 12, 3))
    expected = run(build(folder), requests)
    found = run(tiered(folder), requests, aborted)
    for request_id, tokens in found.items():
        assert tokens == expected[request_id][: len(tokens)]
        if request_id not in aborted:
            assert tokens == expected[request_id]


def test_a_conversation_that_went_to_host_memory_is_hit_there(folder: Path) -> None:
    engine = tiered(folder)
    first = make_requests(1, seed=3)[0]
    before = run(engine, [first])
    run(engine, make_requests(8, seed=4))  # push it out
    hits = engine.stats().prefix_hits
    again = msgspec.structs.replace(first, request_id="again")
    assert run(engine, [again])["again"] == before[first.request_id]
    page = TINY_NSA.page
    assert engine.stats().prefix_hits - hits == (len(first.prompt_token_ids) - 1) // page * page


class FailingLane(SameLane):
    """Some copies fail as if the system had refused them."""

    def __init__(self, failing: frozenset[int]) -> None:
        super().__init__()
        self.failing, self.number = failing, 0

    def run(self, job, *, to_device):
        self.number += 1
        if self.number in self.failing:
            raise RuntimeError("no copy today")
        return super().run(job, to_device=to_device)


def test_a_lost_page_fails_the_requests_that_hold_it_and_no_other(folder: Path) -> None:
    requests = make_requests(12, seed=2)
    expected = run(build(folder), requests)
    engine = tiered(folder)
    runner: Any = engine._runner
    runner._runner.tier._mover._lane = lane = FailingLane(frozenset({5, 9}))
    failed: dict[str, str] = {}
    found = run(engine, requests, failed=failed)
    assert lane.number > 9
    assert 0 < len(failed) < 12
    assert set(failed.values()) == {PAGE_LOST}
    for request_id, tokens in found.items():
        whole = len(tokens) if request_id in failed else None
        assert tokens == expected[request_id][:whole]


def check_hot_pages(engine: Engine) -> None:
    """What is listed as hot has the bytes of its page in host memory."""
    worker: Any = engine._runner
    pool, tier = worker.pool, worker._runner.tier
    if tier._due:
        return  # pages are about to move
    residence = engine._cache.residence
    slots = torch.tensor([residence.slot(block_id) for block_id in range(pool.num_blocks)])
    slots = slots.where(slots == pool.slot_table, -1)  # else its block has ended
    for hot, near, far in zip(tier.prefetcher._layers, pool.kv, tier.host.kv, strict=True):
        heads, block_ids = torch.where((hot.places >= 0) & (slots >= pool.num_slots))
        places = hot.first_slot + hot.places[heads, block_ids].long()
        pages = slots[block_ids] - pool.num_slots
        for hot_part, part in ((near.k, far.k), (near.v, far.v)):
            found, wanted = hot_part[places, heads], part[pages, heads]
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # NaN is equal


def check_failures(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Some requests of an engine whose steps break off fail, and nobody is told anything wrong."""
    step, failed = engine.step, {}

    def stubborn(now: float) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        with contextlib.suppress(KeyboardInterrupt):
            outputs = step(now)
        check_hot_pages(engine)
        return outputs

    engine.step = stubborn  # type: ignore[method-assign]
    found = run(engine, make_requests(24, seed=1), failed=failed)
    assert 0 < len(failed) < 24
    assert set(failed.values()) <= {OUT_OF_MEMORY, STEP_FAILED}
    for request_id, tokens in found.items():
        whole = len(tokens) if request_id in failed else None
        assert tokens == expected[request_id][:whole]


NO_MEMORY = RuntimeError("can't allocate memory")


@pytest.mark.parametrize(
    ("where", "error"),
    [("start", NO_MEMORY), ("_queue_or_lose", MemoryError()), ("_queue_or_lose", ValueError())],
    ids=["around-copies", "between-copies", "fault-between-copies"],
)
def test_what_a_failed_step_did_not_do_of_its_pages_is_done_before_the_next(
    folder: Path, resident: dict[str, list[int]], where: str, error: Exception
) -> None:
    engine = tiered(folder)
    runner: Any = engine._runner
    mover = runner._runner.tier._mover
    setattr(mover, where, Breaking(getattr(mover, where), error, every=7))
    check_failures(engine, resident)


@pytest.mark.parametrize("error", [NO_MEMORY, KeyboardInterrupt()], ids=["no-memory", "ctrl-c"])
def test_a_page_that_a_failed_step_was_bringing_in_is_not_taken_to_be_there(
    folder: Path,
    resident: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    monkeypatch.setattr(block_copy, "_copy", Breaking(block_copy._copy, error, every=61))
    check_failures(tiered(folder), resident)


def test_nothing_moves_where_everything_fits(folder: Path) -> None:
    engine = tiered(folder, kv_cache_memory_bytes=64 << 20)
    run(engine, make_requests(6, seed=5))
    tier = engine.stats().tier
    assert (tier.lookups, tier.out_bytes, tier.in_bytes) == (0, 0, 0)


def test_without_the_flag_there_is_no_tier(folder: Path) -> None:
    assert build(folder).stats().tier is None


def test_a_host_tier_needs_sparse_attention(tmp_path: Path) -> None:
    write_config(tmp_path, TINY_LLAMA)
    with pytest.raises(ConfigError, match="needs Native Sparse Attention"):
        tiered(tmp_path, attention="dense")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_host_memory_bytes": 4096}, "holds no transfer of 256 pages"),
        ({"kv_host_memory_bytes": 1 << 50}, "exceeds the host's free memory"),
        ({"kv_cache_memory_bytes": 400_000}, "needs 7 pages on the device"),
        ({"kv_host_memory_bytes": -1}, "must not be negative"),
        ({"kv_runners_up": 65}, "must be 0 to 64, not 65"),
    ],
)
def test_sizes_that_cannot_work_are_refused_in_numbers(folder, flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiered(folder, **flags)


def test_a_prompt_longer_than_both_tiers_is_refused_at_the_door(folder: Path) -> None:
    engine = tiered(folder)
    long = EngineRequest(
        request_id="long", prompt_token_ids=[1] * 2000, sampling=SamplingParams(temperature=0.0)
    )
    with pytest.raises(PromptTooLong):
        engine.add(long, 0.0)
    assert run(engine, make_requests(1, seed=6))
