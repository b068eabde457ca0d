"""Host memory in large pages, for pools that are read and written a few lines at a time."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch


def allocate_large(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor on the CPU, page-aligned, in pages of 2 MiB where the system has them.

    A decode step touches some lines in every layer of many pages. In pages of 4 KiB each of them
    is a walk through the page tables first, which under a hypervisor takes longer than the access.
    """
    if num_elements == 0:
        return torch.empty(0, dtype=dtype)
    # Shared memory, the default, is not given large pages unless the system is set up for it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements)
