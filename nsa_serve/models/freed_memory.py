"""How the C library treats memory that a step has freed."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc accepts at most
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Keep freed memory for the next step, where the C library is glibc; elsewhere do nothing.

    Every step on a CPU frees its activations. Handed back to the system, each of their pages would
    be faulted in and cleared anew by the next step: a prompt of 4,096 tokens took up to 900,000
    page faults so. It holds for the whole process, whose memory then stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
