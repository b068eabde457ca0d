"""The cache's bytes in host memory: pages that the device reads in place."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import torch

from .large_pages import allocate_large
from .layout import KVLayout

logger = logging.getLogger(__name__)

Pin = Callable[[int, int], bool]  # (address, bytes) -> whether they are page-locked now
Unpin = Callable[[int], object]  # (address that was given to Pin)

_PIECE = 1 << 30  # bytes page-locked at a time


class HostPool:
    """Raw pages by host slot, in the order of bytes of a ``DevicePool``."""

    def __init__(self, layout: KVLayout, raw: torch.Tensor) -> None:
        self.layout = layout
        self.num_slots = raw.numel() // layout.slot_elements
        self._raw = raw[: layout.raw_elements(self.num_slots)]
        self.kv = [layout.paged_view(self._raw, layer) for layer in range(layout.num_layers)]

    @property
    def pages(self) -> torch.Tensor:
        """Whole pages [host slots, values of a page]."""
        return self._raw.view(self.num_slots, self.layout.slot_elements)

    @property
    def num_bytes(self) -> int:
        return self._raw.numel() * self.layout.dtype.itemsize

    def poison(self) -> None:
        """Fill everything with NaN, so that a read of what nobody wrote shows."""
        self._raw.fill_(torch.nan)


class PinnedMemory:
    """Host memory that is page-locked piece by piece on a thread of its own.

    Locking takes about half a second a gigabyte: it runs while the weights are read. Where the
    system refuses a piece, what was locked before it is what there is. Pieces hold whole ``unit``
    bytes, since one copy may not reach over two of them, and whole pages of the system. They are
    unlocked before the memory is freed: the driver refuses addresses that it holds to be locked.
    """

    def __init__(
        self,
        num_bytes: int,
        pin: Pin | None = None,
        unpin: Unpin | None = None,
        *,
        flag: str = "--kv-host-memory-bytes",
        unit: int = 1,
        piece: int = _PIECE,
    ) -> None:
        self._flag = flag
        self._pin = pin or pin_for_cuda
        self._locked: list[int] = []  # addresses of pieces
        self._memory = allocate_large(
            num_bytes, torch.uint8, partial(_unlock, self._locked, unpin or unpin_for_cuda)
        )
        whole = math.lcm(unit, mmap.PAGESIZE)
        self._piece = max(1, piece // whole) * whole
        self._num_pinned = 0
        self._thread = Thread(target=self._run, name="pin-host-memory", daemon=True)
        self._thread.start()

    def wait(self) -> torch.Tensor:
        """The bytes that are page-locked [m] uint8, once no more will be."""
        self._thread.join()
        return self._memory[: self._num_pinned]

    def _run(self) -> None:
        asked = self._memory.numel()
        for start in range(0, asked, self._piece):
            length = min(self._piece, asked - start)
            if not self._pin(self._memory.data_ptr() + start, length):
                logger.warning(
                    "the system page-locks only %d of the %d bytes of %s: "
                    "raise the limit of locked memory (ulimit -l), or lower that flag",
                    start,
                    asked,
                    self._flag,
                )
                return
            self._locked.append(self._memory.data_ptr() + start)
            self._num_pinned = start + length


def _unlock(addresses: list[int], unpin: Unpin) -> None:
    for address in addresses:
        unpin(address)


def pin_for_cuda(address: int, num_bytes: int) -> bool:
    """Page-lock memory for every CUDA device of this process."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(address, num_bytes, 0)) == 0


def unpin_for_cuda(address: int) -> None:
    """Undo ``pin_for_cuda``."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)
