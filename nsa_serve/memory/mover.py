"""Copies of whole pages between the device and the host, merged into large transfers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..schedule.plan import BlockMove
from .copy_lane import CopyLane
from .device_pool import DevicePool
from .host_pool import HostPool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TransferCounts:
    """Copies of one direction."""

    num_bytes: int = 0
    num_transfers: int = 0  # contiguous copies over the link


class BlockMover:
    """Does the moves of residence updates, in their order.

    Neighbouring host slots make one transfer: device pages are gathered in a slab on the device
    first, on the lane of the copies. Computation is made to wait only for what it is about to read
    or overwrite: a page that is copied ahead of need is read where it was.
    """

    def __init__(self, pool: DevicePool, host: HostPool, lane: CopyLane, *, slab: int) -> None:
        self.counts = {True: TransferCounts(), False: TransferCounts()}  # by whether to the device
        self._device = pool.pages
        self._host = host.pages
        self._first_host = pool.num_slots
        self._lane = lane
        self._slab = torch.empty_like(self._device[:slab])
        self._numbers: dict[int, int] = {}  # target slot -> its last copy
        self.lost: list[int] = []  # blocks whose copies failed

    def start(self, moves: deque[BlockMove], slots: Sequence[tuple[int, int]]) -> None:
        """Queue the ``moves``, and make computation wait for those that it depends on.

        ``slots`` are (block id, where it is read from now on). A move that is queued is taken out
        of ``moves``; of a run that is interrupted all may be queued once more, which harms nothing.
        """
        awaited = 0
        for run in merged(tuple(moves), len(self._slab), self._first_host):
            number = self._queue_or_lose(run)
            if run[0].to_device:
                awaited = number
            for move in run:
                self._numbers[move.target_slot] = number
            for _ in run:
                moves.popleft()
        for _, slot in slots:
            awaited = max(awaited, self._numbers.get(slot, 0))
        if awaited:
            self._lane.join(awaited)
            self._numbers = {slot: n for slot, n in self._numbers.items() if n > awaited}

    def _queue_or_lose(self, run: Sequence[BlockMove]) -> int:
        """The number of a run's copy; 0 where it failed, and its blocks are lost."""
        try:
            return self._queue(run)
        except torch.AcceleratorError:
            raise  # the device is lost, and all blocks with it
        except RuntimeError:
            logger.exception("a copy of %d pages failed", len(run))
            self.lost.extend(move.block_id for move in run)
            return 0

    def _queue(self, run: Sequence[BlockMove]) -> int:
        to_device = run[0].to_device
        copy = self._copy_in if to_device else self._copy_out
        counts = self.counts[to_device]
        counts.num_bytes += len(run) * self._host[0].nbytes
        counts.num_transfers += 1
        return self._lane.run(partial(copy, run), to_device=to_device)

    def _copy_out(self, run: Sequence[BlockMove]) -> None:
        target = run[0].target_slot - self._first_host
        for page, move in zip(self._slab, run, strict=False):
            page.copy_(self._device[move.source_slot], non_blocking=True)
        self._host[target : target + len(run)].copy_(self._slab[: len(run)], non_blocking=True)

    def _copy_in(self, run: Sequence[BlockMove]) -> None:
        source = run[0].source_slot - self._first_host
        pages = self._slab[: len(run)]
        pages.copy_(self._host[source : source + len(run)], non_blocking=True)
        for page, move in zip(pages, run, strict=True):
            self._device[move.target_slot].copy_(page, non_blocking=True)


def merged(moves: Sequence[BlockMove], slab: int, first_host: int = 0) -> Iterator[list[BlockMove]]:
    """``moves`` in runs of one direction and neighbouring slots in one slab of the host's pages.

    No run reaches over two slabs, so that none reaches over two pieces of page-locked memory.
    """
    run: list[BlockMove] = []
    for move in moves:
        starts = (_host_slot(move) - first_host) % slab == 0
        if run and (starts or not _follows(run[-1], move)):
            yield run
            run = []
        run.append(move)
    if run:
        yield run


def _follows(last: BlockMove, move: BlockMove) -> bool:
    if last.to_device != move.to_device:
        return False
    return _host_slot(move) == _host_slot(last) + 1


def _host_slot(move: BlockMove) -> int:
    return move.source_slot if move.to_device else move.target_slot
