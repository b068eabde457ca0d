"""Moments on a device's queue, summed up without asking the host."""

from __future__ import annotations

from time import perf_counter_ns

import torch

from ..contracts import check


def add_clock(total: torch.Tensor, sign: int) -> None:
    """Add ``sign`` times the present moment, in ns, to ``total`` [1] int64.

    Once with −1 and later with 1 adds the time between. Moments of one device alone compare.
    """
    check(total.dtype == torch.int64 and total.numel() == 1, "total is one int64", total=total)
    total.add_(sign * perf_counter_ns())
