"""The benchmark of the host tier asks for a hit rate and gets it."""

import pytest
import torch

from nsa_serve.bench.host_tier import build_case, measure_rate, replayed
from nsa_serve.bench.synthetic import AttentionShape
from nsa_serve.kernels.shapes import NSAShape

NSA = NSAShape(compress_len=8, compress_stride=4, page=16, num_selected=8, window=24)


@pytest.fixture(scope="module")
def case():
    return build_case(
        4, 4096, AttentionShape(4, 2, 8, 8), torch.device("cpu"), nsa=NSA, dtype=torch.float32,
        hot_per_stream=24,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.85, 0.99])
def test_the_hit_rate_that_is_asked_for_is_the_one_measured(case, rate):
    row = measure_rate(case, rate, link=51e9, num_steps=40)
    assert abs(row.hit_rate - rate) < 0.04
    assert row.fetched_bytes > 0
    assert row.fetch.median > 0 < row.attention.median
    assert row.link_ms == pytest.approx(row.fetched_bytes / 51e6)


def test_a_replayed_selection_is_ascending_with_the_forced_pages_in_it(case):
    for selection in replayed(case, 0.9, 3):
        assert (selection[..., 0] == 0).all()
        assert (selection == 4096 // NSA.page - 1).any(-1).all()
        real = selection.masked_fill(selection < 0, 1 << 20)
        assert (real.diff(dim=-1) >= 0).all()
