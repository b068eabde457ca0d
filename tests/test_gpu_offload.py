"""Weights streamed from pinned memory on a GPU: beside the computation, and inside graphs."""

from __future__ import annotations

import pytest
import torch

from nsa_serve import LLM, SamplingParams
from nsa_serve.kernels import gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flags", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_text_is_the_same_with_streamed_weights(flags):
    prompts = [[200 + i + j for j in range(40 + 90 * i)] for i in range(6)]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    base = {
        "device": "cuda", "attention": "nsa", "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 8,
        **flags,
    }  # fmt: skip
    resident = LLM(**base)
    expected = resident.generate(prompts, sampling)
    llm = LLM(**base, cpu_offload_bytes=150 << 20)
    found = llm.generate(prompts, sampling)
    assert [a.token_ids for a in found] == [b.token_ids for b in expected]
    worker = llm._engine._runner
    assert worker.num_device_bytes < resident._engine._runner.num_device_bytes
    stream = llm._engine.stats().stream
    assert stream.num_bytes >= 24 * worker.stream_plan.host_bytes
    assert stream.seconds > 0
    assert 0 <= stream.overlap <= 1
    assert resident._engine.stats().stream is None


def test_the_time_between_two_clocks_is_that_of_what_was_queued_between():
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    a = torch.randn(4096, 4096, device="cuda")
    # The first round compiles.
    for num_products in (1, 0, 20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total.zero_()
        start.record()
        gpu.add_clock(total, -1)
        for _ in range(num_products):
            a @ a
        gpu.add_clock(total, 1)
        end.record()
        torch.cuda.synchronize()
        # What is queued around the clocks may take its time where others use the device.
        assert 0 < total.item() < 1.05e6 * start.elapsed_time(end) + 1e4
    assert total.item() > 0.8e6 * start.elapsed_time(end)
