"""Host memory in large pages, for pools that are read and written a few lines at a time."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from contextlib import suppress

import torch


class _Memory(mmap.mmap):
    """Anonymous memory; ``before_free`` is called when nothing refers to it any more."""

    before_free: Callable[[], None] | None = None

    def __del__(self) -> None:
        # A weak reference's callback would come after the memory was given back.
        if self.before_free is not None and not sys.is_finalizing():
            self.before_free()


def allocate_large(
    num_elements: int, dtype: torch.dtype, before_free: Callable[[], None] | None = None
) -> torch.Tensor:
    """A flat tensor on the CPU, page-aligned, in pages of 2 MiB where the system has them.

    A decode step touches some lines in every layer of many pages. In pages of 4 KiB each of them
    is a walk through the page tables first, which under a hypervisor takes longer than the access.
    ``before_free`` is called once neither this tensor nor a view of it is left, and must not refer
    to them.
    """
    if num_elements == 0:
        return torch.empty(0, dtype=dtype)
    # Shared memory, the default, is not given large pages unless the system is set up for it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = _Memory(-1, num_elements * dtype.itemsize, flags=flags)
    memory.before_free = before_free
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements)
