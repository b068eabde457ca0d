"""Moments on a device's queue, summed up without asking the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ..contracts import check


@triton.jit
def _add_clock(total_ptr, sign):
    tl.atomic_add(total_ptr, sign * globaltimer().to(tl.int64))


def add_clock(total: torch.Tensor, sign: int) -> None:
    """Add ``sign`` times the present moment, in ns, to ``total`` [1] int64.

    Once with −1 and later with 1 adds the time between. Moments of one device alone compare.
    """
    check(total.dtype == torch.int64 and total.numel() == 1, "total is one int64", total=total)
    _add_clock[(1,)](total, sign, num_warps=1)
