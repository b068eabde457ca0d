"""What Nsight Compute reports of the multiprocessors, read off."""

from __future__ import annotations

import pytest

from nsa_serve.bench import sm_spread

REPORT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_attend_kernel","sm__cycles_active.avg","cycle","1,000,000.00"
"0","7","_attend_kernel","sm__cycles_active.max","cycle","1,050,000.00"
"1","7","_sparse_kernel","sm__cycles_active.avg","cycle","400.00"
"1","7","_sparse_kernel","sm__cycles_active.max","cycle","404.00"
"""


def test_launches_are_read_in_order_with_their_spread():
    first, second = sm_spread.read_report(REPORT)
    assert (first.kernel, first.most, first.mean) == ("_attend_kernel", 1_050_000, 1_000_000)
    assert first.share == pytest.approx(0.05)
    assert second.record()["spread"] == pytest.approx(0.01)


def test_a_report_without_launches_is_empty():
    assert sm_spread.read_report("==PROF== No kernels were profiled.") == []


def test_without_the_profiler_there_is_no_figure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert sm_spread.measure(8192) == []
