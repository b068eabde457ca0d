"""Benchmarks of an engine with a host tier, on a tiny model: overlap, copies, throughput."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nsa_serve.bench.engine_run import BenchEngine
from nsa_serve.bench.replay import SelectionReplay
from nsa_serve.bench.tiered_engine import app
from nsa_serve.kernels.shapes import StepBatch
from tests.checkpoints import PHIS, TINY_NSA, gated, nsa_config_json, write_config

CONTEXT = 640  # 40 pages
# 50 pages on the device, 512 on the host.
SMALL = ["--device", "cpu", "--cache", 900_000, "--host", 0.002, "--budget", 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = nsa_config_json(gated(PHIS["mean"]), max_position_embeddings=2048)
    return str(write_config(tmp_path_factory.mktemp("shape"), config))


def lines(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


def decode_batch(positions):
    T = len(positions)
    rows = torch.arange(T + 1, dtype=torch.int32)
    table = torch.zeros(T, 200, dtype=torch.int32)
    return StepBatch(
        torch.tensor(positions), rows[:-1], rows, torch.tensor(positions).int() + 1, table, table,
        max_query_len=1, max_context_len=3200,
    )  # fmt: skip


@pytest.fixture
def replay(folder):
    bench = BenchEngine.start(folder, device="cpu", dtype="float32", max_num_seqs=4)
    return SelectionReplay(bench.parts.worker.model, max_rows=4, num_ahead=2)


def test_forced_pages_stay_and_free_choices_are_distinct_pages_between_them(replay):
    batch = decode_batch([1000, 500, 20, -1])
    replay.keep.fill_(0.5)
    for _ in range(5):
        listed = replay.selection(0, batch, None)
        other = replay.selection(1, batch, None)
        assert listed.shape == (4, 2, TINY_NSA.num_selected)
        for row, position in enumerate([1000, 500]):
            page = position // TINY_NSA.page
            for found in [*listed[row].tolist(), *other[row].tolist()]:
                assert sorted(set(found)) == found
                assert found[0] == 0
                assert found[-2:] == [page - 1, page]
        assert listed[2, 0].tolist() == [0, 1, -1, -1]  # as short as it is, all is selected
        assert (listed[3] == -1).all()


def test_runners_up_are_far_pages_beside_the_selected_ones(replay):
    batch = decode_batch([1000, 90, 20, -1])
    replay.keep.fill_(0.5)
    for _ in range(5):
        listed = replay.selection(0, batch, None)
        ranked = replay.ranked(0, batch)
        assert torch.equal(ranked[..., : TINY_NSA.num_selected], listed)
        for row, position in enumerate([1000, 90]):
            for found in ranked[row].tolist():
                there = [page for page in found if page >= 0]
                assert len(set(there)) == len(there)
                assert max(there) == position // TINY_NSA.page
        assert (ranked[0] >= 0).all()
        assert (ranked[3] == -1).all()


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_as_much_is_kept_as_was_asked_for(replay, keep):
    replay.keep.fill_(keep)
    first = replay.selection(0, decode_batch([3000] * 4), None).clone()
    again = [replay.selection(0, decode_batch([3000] * 4), None).clone() for _ in range(3)]
    assert all(torch.equal(first, other) == (keep == 1.0) for other in again)


def test_prompts_in_chunks_keep_their_own_selection(replay):
    batch = decode_batch([1000])
    object.__setattr__(batch, "max_query_len", 8)
    own = torch.ones(1, 2, TINY_NSA.num_selected, dtype=torch.int32)
    assert replay.selection(0, batch, own) is own


def test_streams_beyond_the_device_decode_at_every_overlap(folder):
    found = lines(
        "rates", "--shape", folder, *SMALL, "--context", CONTEXT, "--streams", 4, "--steps", 4,
        "--resident", 1, "--kv-runners-up", 2,
    )  # fmt: skip
    points = [line for line in found if "kept" in line]
    assert [point["kept"] for point in points] == [0.99, 0.95, 0.90, 0.85]
    assert all(0 < point["hit_rate"] <= 1 and point["lookups"] > 0 for point in points)
    assert points[-1]["missed_mb"] > 0
    assert points[-1]["prefetched_mb"] > 0
    assert points[0]["floor_tokens_per_s"] > 0
    copies = {line["copies"]: line for line in found if "copies" in line}
    assert copies["out"]["mean_mb"] > 0 < copies["in"]["gb_per_s"]


def test_a_tier_that_holds_nothing_is_measured_against_none(folder):
    found = lines(
        "idle", "--shape", folder, *SMALL, "--cache", 8_000_000, "--context", CONTEXT,
        "--streams", 1, "--turns", 1,
    )  # fmt: skip
    assert [line["tier"] for line in found if "tier" in line] == ["without", "with"]
    assert found[-1]["lookups"] == 0


def test_more_streams_than_fit_are_served_with_the_tier_and_without(folder):
    found = lines(
        "oversubscribed", "--shape", folder, *SMALL, "--context", CONTEXT, "--streams", 6,
        "--tokens", 4, "--few", 2,
    )  # fmt: skip
    with_tier, without = (line for line in found if "requests" in line)
    assert (with_tier["requests"], without["requests"]) == (6, 2)
    assert 0 < with_tier["hit_rate"] <= 1
    assert without["hit_rate"] is None
    gain = with_tier["tokens_per_s"] / without["tokens_per_s"]
    assert found[-1]["gain"] == pytest.approx(gain)


def test_a_prompt_beyond_the_device_is_computed(folder):
    found = lines("ttft", "--shape", folder, *SMALL, "--context", 1500)
    (line,) = (line for line in found if "ttft_s" in line)
    assert line["ttft_s"] > 0
    assert line["context"] == 1500
