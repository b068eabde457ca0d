"""Prefixes that the cache gave up and a disk kept: the same text, over restarts and damage."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.errors import ConfigError
from nsa_serve.memory import disk_tier
from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.host_pool import HostPool
from nsa_serve.memory.layout import KVLayout
from nsa_serve.memory.page_store import KEY_BYTES, PageStore
from nsa_serve.memory.tier import HostTier
from nsa_serve.runner import host_memory
from nsa_serve.schedule.plan import BlockMove, PageAt, ResidenceUpdate, StepPlan
from nsa_serve.server.flags import ServeFlags, parse_disk
from tests.checkpoints import PHIS, TINY_NSA, gated, nsa_config_json, write_checkpoint
from tests.tiered_engine import Breaking, build, make_requests, run

PAGE = TINY_NSA.page
CACHE = 380_000  # 36 pages; the longest of these requests takes 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = nsa_config_json(gated(PHIS["mean"]), max_position_embeddings=544)
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), config)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some pages, as these are small."""

    def open_small(*args: Any) -> PageStore:
        return PageStore(*args, segment_bytes=20_000)

    monkeypatch.setattr(host_memory, "PageStore", open_small)
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 20_000)


def on_disk(folder: Path, disk: Path, **flags: Any) -> Engine:
    return build(folder, **{"kv_cache_memory_bytes": CACHE, "kv_disk_dir": str(disk), **flags})


def tier_of(engine: Engine) -> disk_tier.DiskTier:
    worker: Any = engine._runner
    return worker.disk


def fill(folder: Path, disk: Path, requests: Any, **flags: Any) -> dict[str, list[int]]:
    """Outputs of an engine that gave up pages of all ``requests`` before it ended."""
    engine = on_disk(folder, disk, **flags)
    outputs = run(engine, requests)
    run(engine, make_requests(4, seed=99))
    tier_of(engine).close()
    return outputs


def hits(engine: Engine, request: Any) -> tuple[int, list[int]]:
    """Tokens of the prompt that the cache had, and the output, of a request asked alone."""
    before = engine.stats().prefix_hits
    tokens = run(engine, [request])[request.request_id]
    return engine.stats().prefix_hits - before, tokens


def in_full(request: Any) -> int:
    return (len(request.prompt_token_ids) - 1) // PAGE * PAGE


def test_a_prefix_survives_a_restart(folder: Path, tmp_path: Path) -> None:
    requests = make_requests(2, seed=3)
    expected = fill(folder, tmp_path, requests)
    engine = on_disk(folder, tmp_path)
    for request in requests:
        number, tokens = hits(engine, request)
        assert number == in_full(request)
        assert tokens == expected[request.request_id]
    report = engine.stats().disk
    assert report is not None
    assert report.read_bytes > 0 == report.bad_pages
    tier_of(engine).close()


def test_pages_are_saved_from_both_tiers_and_loaded_whole(tmp_path: Path) -> None:
    layout = KVLayout(3, 2, 8, 4, page=16, entries_per_page=4, dtype=torch.float32)
    pool = DevicePool(layout, 4, 12, "cpu", num_host=8)
    host = HostTier(pool, HostPool(layout, pool.behind), slab=2, num_hot=1)
    size = 4 * (layout.slot_elements + layout.entry_elements)
    store = PageStore(tmp_path, b"k" * KEY_BYTES, size, 1 << 20)
    tier = disk_tier.DiskTier(store, pool, host)
    pool.pages.normal_()
    host.host.pages.normal_()
    pool.entries.normal_()
    digests = [bytes([n]) * KEY_BYTES for n in range(2)]
    # Slot 2 is the device's, slot 9 the host's page 5.
    tier.save([PageAt(digests[0], 7, 2), PageAt(digests[1], 3, 9)])
    raw = [pool.pages[2].clone(), host.host.pages[5].clone()]
    entries = [pool.entries[:, 7].clone(), pool.entries[:, 3].clone()]
    pool.poison()
    host.host.poison()
    tier._writer.submit(int).result()
    number = tier.fetch([*digests, b"?" * KEY_BYTES])
    tier._reader.submit(int).result()
    assert tier.take_fetched() == [(number, digests)]
    tier.load([PageAt(digests[0], 1, 0), PageAt(digests[1], 2, 1)])
    for at in range(2):
        assert torch.equal(pool.pages[at], raw[at])
        assert torch.equal(pool.entries[:, 1 + at], entries[at])
    assert tier.take_lost() == []
    assert not tier._at_hand
    tier.close()


def test_text_is_the_same_with_pages_that_come_and_go(folder: Path, tmp_path: Path) -> None:
    requests = make_requests(8, seed=1)
    expected = run(build(folder), requests)
    engine = on_disk(folder, tmp_path)
    assert run(engine, requests) == expected
    again = [msgspec.structs.replace(r, request_id=f"again-{r.request_id}") for r in requests]
    tier_of(engine)._writer.submit(int).result()  # all that was evicted is there
    found = run(engine, again)
    assert {f"again-{name}": tokens for name, tokens in expected.items()} == found
    report = engine.stats().disk
    assert report is not None
    assert report.written_bytes > 0 < report.read_bytes
    assert not tier_of(engine)._at_hand
    tier_of(engine).close()


def test_requests_that_leave_while_their_pages_are_read_leave_nothing(
    folder: Path, tmp_path: Path
) -> None:
    requests = make_requests(2, seed=3)
    fill(folder, tmp_path, requests)
    engine = on_disk(folder, tmp_path)
    for request in requests:
        engine.add(request, 0.0)
    assert engine._scheduler.awaits_pages
    for request in requests:
        assert engine.abort(request.request_id, 0.0) is not None
    tier_of(engine)._reader.submit(int).result()
    run(engine, [make_requests(1, seed=8)[0]])
    assert not tier_of(engine)._at_hand
    engine.check()
    tier_of(engine).close()


def test_pages_on_their_way_leave_the_first_request_its_places_in_the_end(
    folder: Path, tmp_path: Path
) -> None:
    known, stored = make_requests(2, seed=3)
    fill(folder, tmp_path, [stored])
    more = msgspec.structs.replace(
        known,
        request_id="more",
        prompt_token_ids=[*known.prompt_token_ids, *range(40)],
        priority=-8,
    )
    expected = run(build(folder), [more, stored])
    # Seven pages on the device, of which a step may need all.
    engine = on_disk(
        folder, tmp_path, kv_cache_memory_bytes=630_000, kv_host_memory_bytes=2 << 20,
        scheduling_policy="priority",
    )  # fmt: skip
    run(engine, [known])
    found: dict[str, list[int]] = {"more": [], stored.request_id: []}
    for request in (stored, more):
        engine.add(request, 0.0)
    tier_of(engine)._reader.submit(int).result()
    while engine.has_work:
        for output in engine.step(0.0):
            assert output.error is None
            found[output.request_id] += output.token_ids
        engine.check()
    assert found == expected
    tier_of(engine).close()


def test_damage_is_computed_anew_and_nothing_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    requests = make_requests(2, seed=3)
    expected = fill(folder, tmp_path, requests)
    for path in tmp_path.glob("*/*.pages"):
        damaged = bytearray(path.read_bytes())
        for at in range(3000, len(damaged), 1000):
            damaged[at] ^= 255
        path.write_bytes(damaged)
    engine = on_disk(folder, tmp_path)
    for request in requests:
        assert hits(engine, request)[1] == expected[request.request_id]
    report = engine.stats().disk
    assert report is not None
    assert report.bad_pages > 0
    tier_of(engine).close()


def test_a_page_that_cannot_be_loaded_fails_who_would_read_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(1, seed=3)
    expected = fill(folder, tmp_path, requests)
    engine = on_disk(folder, tmp_path)

    def refuse(page: Any, content: bytes) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(tier_of(engine), "_place", refuse)
    failed: dict[str, str] = {}
    run(engine, requests[:1], failed=failed)
    assert list(failed) == [requests[0].request_id]
    monkeypatch.undo()
    again = msgspec.structs.replace(requests[0], request_id="again")
    assert run(engine, [again])["again"] == expected[requests[0].request_id]
    tier_of(engine).close()


def test_a_read_that_breaks_is_a_miss_and_its_request_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(1, seed=3)
    expected = fill(folder, tmp_path, requests)
    engine = on_disk(folder, tmp_path)
    store = tier_of(engine).store
    read = store.get

    def broken(digest: bytes) -> bytes | None:
        if store.counts.read_pages:
            raise MemoryError
        return read(digest)

    monkeypatch.setattr(store, "get", broken)
    assert hits(engine, requests[0]) == (PAGE, expected[requests[0].request_id])
    assert not engine._scheduler.awaits_pages
    tier_of(engine).close()


def test_pages_that_cannot_be_copied_or_written_are_dropped_and_fail_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no memory")

    requests = make_requests(6, seed=1)
    expected = run(build(folder), requests)
    engine = on_disk(folder, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(tier_of(engine), "_copied", refuse)
        assert run(engine, requests[:3]) == {
            r.request_id: expected[r.request_id] for r in requests[:3]
        }
    report = engine.stats().disk
    assert report is not None
    assert report.dropped_pages > 0 == report.written_bytes
    with monkeypatch.context() as broken:
        broken.setattr(tier_of(engine).store, "put", refuse)
        assert run(engine, requests[3:]) == {
            r.request_id: expected[r.request_id] for r in requests[3:]
        }
        tier_of(engine)._writer.submit(int).result()
    assert tier_of(engine)._num_queued == 0
    tier_of(engine).close()


def test_pages_at_hand_are_let_go_where_the_step_that_was_to_load_them_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"kv_cache_memory_bytes": 660_000, "kv_host_memory_bytes": 2 << 20}
    requests = make_requests(1, seed=3)
    expected = fill(folder, tmp_path, requests)
    engine = on_disk(folder, tmp_path, **both)
    worker: Any = engine._runner

    def refuse(num_left: int = 0) -> None:
        raise RuntimeError("no memory")

    failed: dict[str, str] = {}
    with monkeypatch.context() as broken:
        broken.setattr(worker.tier, "catch_up", refuse)
        run(engine, requests, failed=failed)
    assert list(failed) == [requests[0].request_id]
    assert not tier_of(engine)._at_hand
    assert run(engine, requests) == expected
    tier_of(engine).close()


def test_a_page_that_leaves_after_a_failed_step_is_saved_as_that_was_to_move_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = on_disk(folder, tmp_path, kv_cache_memory_bytes=660_000, kv_host_memory_bytes=2 << 20)
    worker: Any = engine._runner
    pool, first_host = worker.pool, worker.pool.num_slots
    page = pool.pages[5].normal_().numpy().tobytes()
    out = ResidenceUpdate([BlockMove(3, 5, first_host, False)], [(3, first_host)], True)
    lane = worker.tier._mover._lane
    with monkeypatch.context() as broken:
        broken.setattr(lane, "run", Breaking(lane.run, MemoryError(), every=1))
        with pytest.raises(MemoryError):
            worker.launch(StepPlan(0, [], [], [], residence=out))
    digest = bytes(range(KEY_BYTES))
    leaves = [PageAt(digest, 3, first_host)]
    worker.launch(StepPlan(1, [], [], [], leaves, ResidenceUpdate([], [], True)))
    tier_of(engine).close()
    assert tier_of(engine).store.get(digest)[: len(page)] == page


def test_nobody_finds_what_another_model_or_salt_has_left(folder: Path, tmp_path: Path) -> None:
    request = make_requests(1, seed=3)[0]
    fill(folder, tmp_path, [request])
    others: list[dict[str, Any]] = [
        {"deterministic": True},
        {"dtype": "bfloat16"},
        {"seed": 4},
        {"max_model_len": 540},
    ]
    for flags in others:
        engine = on_disk(folder, tmp_path, **flags)
        engine.add(request, 0.0)
        assert not engine._scheduler.awaits_pages
        tier_of(engine).close()
    same = on_disk(folder, tmp_path)
    assert hits(same, msgspec.structs.replace(request, cache_salt="other"))[0] == 0
    assert hits(same, request)[0] == in_full(request)
    tier_of(same).close()


def test_a_reset_forgets_what_the_disk_has(folder: Path, tmp_path: Path) -> None:
    request = make_requests(1, seed=3)[0]
    fill(folder, tmp_path, [request])
    engine = on_disk(folder, tmp_path)
    engine._scheduler.reset_prefix_cache()
    assert hits(engine, request)[0] == 0
    assert not list(tmp_path.glob("*/*.pages"))
    tier_of(engine).close()


def test_a_slow_disk_drops_pages_and_holds_nobody_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_tier, "_QUEUED_BYTES", 0)
    requests = make_requests(3, seed=2)
    engine = on_disk(folder, tmp_path)
    assert run(engine, requests) == run(build(folder), requests)
    report = engine.stats().disk
    assert report is not None
    assert report.written_bytes == 0 < report.dropped_pages
    tier_of(engine).close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_disk_bytes": 1000}, "holds too few files"),
        ({"kv_disk_bytes": 0}, "its size must be positive"),
        ({"enable_prefix_caching": False}, "needs --enable-prefix-caching"),
        ({"kv_disk_dir": "/dev/null/pages"}, "--kv-disk-dir /dev/null/pages: "),
    ],
)
def test_a_disk_tier_that_cannot_work_is_refused(
    folder: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        on_disk(folder, tmp_path, **flags)


def test_the_flag_takes_a_folder_and_a_size() -> None:
    assert parse_disk(None) == {}
    assert parse_disk("/a/b") == {"kv_disk_dir": "/a/b"}
    assert parse_disk("/a:b:2GiB") == {"kv_disk_dir": "/a:b", "kv_disk_bytes": 2 << 30}
    config: EngineConfig = ServeFlags(kv_disk_dir="/a:1GiB").engine_config()
    assert (config.cache.kv_disk_dir, config.cache.kv_disk_bytes) == ("/a", 1 << 30)
    with pytest.raises(ConfigError, match="no number of bytes"):
        parse_disk("/a:lots")
