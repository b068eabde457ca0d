"""Where kernels are tested: in the interpreter or on a GPU, in which layouts, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter serves machines without a GPU"
)
# Hq, Hkv, Dk, Dv
LAYOUTS = [(64, 4, 128, 128), (9, 3, 64, 64), (16, 2, 192, 128), (12, 4, 96, 96), (2, 2, 128, 64)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN and largest integers, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
