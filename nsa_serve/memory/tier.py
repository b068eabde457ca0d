"""The host tier of one device's cache: its pages, the copies to and from it, the hot blocks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..kernels.dispatch import ops_for
from ..kernels.shapes import StepBatch
from ..models.step import StepInputs
from ..schedule.plan import BlockMove, ResidenceUpdate, TierReport
from .copy_lane import CopyLane, SameLane, SideLane
from .device_pool import DevicePool
from .host_pool import HostPool
from .mover import BlockMover
from .prefetch import SelectionPrefetcher


@dataclass(frozen=True, slots=True)
class BatchAhead:
    """``models.step.Ahead`` of one step."""

    prefetcher: SelectionPrefetcher
    batch: StepBatch

    def room(self) -> torch.Tensor | None:
        return self.prefetcher.room(self.batch)

    def prefetch(self, layer: int, selection: torch.Tensor, ranked: torch.Tensor | None) -> None:
        self.prefetcher.prefetch(self.batch, layer, selection, ranked)

    def finish(self) -> None:
        self.prefetcher.finish()


@dataclass(frozen=True, slots=True)
class _Due:
    """What is still to be done of an update: its moves are taken out as they are queued."""

    moves: deque[BlockMove]
    slots: list[tuple[int, int]]


class HostTier:
    """Applies residence updates to a device pool and a host pool, and serves the pages of both.

    ``slab`` is the number of pages of a merged copy; ``num_hot`` of the device pool's slots, its
    last ones, hold hot blocks.
    """

    def __init__(
        self,
        pool: DevicePool,
        host: HostPool,
        *,
        slab: int,
        num_hot: int,
        num_ranked: int = 0,
        lane: CopyLane | None = None,
    ) -> None:
        self.pool = pool
        self.host = host
        self._lane = lane or (SideLane(pool.device) if pool.device.type == "cuda" else SameLane())
        self._mover = BlockMover(pool, host, self._lane, slab=slab)
        kv = [replace(near, host=far) for near, far in zip(pool.kv, host.kv, strict=True)]
        self.prefetcher = SelectionPrefetcher(
            pool, kv, num_hot=num_hot, num_ranked=num_ranked, ops=ops_for(pool.device)
        )
        self._piece_bytes = pool.layout.bytes_per_slot // (
            pool.layout.num_layers * pool.layout.num_kv_heads
        )
        pool.slot_table.fill_(-1)
        self._due: deque[_Due] = deque()  # oldest first

    def note(self, update: ResidenceUpdate) -> None:
        """An update is due. The books have it done already, so whatever fails it has to come."""
        self._due.append(_Due(deque(update.moves), update.slots))

    def catch_up(self, num_left: int = 0) -> None:
        """Queue the copies of what is due and change the slot table, before the step's kernels.

        The newest ``num_left`` updates stay due. Where this fails, the next call goes on with what
        is left: the moves of an update are right only in their order, and only once.
        """
        while len(self._due) > num_left:
            self._apply(self._due[0])
            self._due.popleft()

    def _apply(self, due: _Due) -> None:
        self._mover.start(due.moves, due.slots)
        if not due.slots:
            return
        packed = torch.from_numpy(np.array(due.slots, np.int64).T.copy())
        if self.pool.device.type == "cuda":
            packed = packed.pin_memory().to(self.pool.device, non_blocking=True)
        block_ids, slots = packed
        self.pool.slot_table.index_copy_(0, block_ids, slots.int())
        self.prefetcher.forget(block_ids)

    def forget_hot(self) -> None:
        """A step failed on its way: a hot block may be listed whose page was never brought in."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)
        self.prefetcher.clear()

    def serve(self, inputs: StepInputs) -> StepInputs:
        """``inputs`` of a step whose pages may lie in host memory."""
        self.prefetcher.begin()
        resident = partial(self.prefetcher.ensure_resident, inputs.batch)
        ahead = BatchAhead(self.prefetcher, inputs.batch)
        return replace(inputs, kv=self.prefetcher.kv, resident=resident, ahead=ahead)

    def settle(self) -> None:
        """Wait until all queued copies are done, and the host's pages are what they are to be."""
        self._lane.finish()

    def take_lost(self) -> tuple[int, ...]:
        """Blocks whose pages could not be copied, since the last call."""
        lost, self._mover.lost = tuple(self._mover.lost), []
        return lost

    @property
    def counts(self) -> torch.Tensor:
        """Counts [5] int64 on the device, as of ``HotBlocks``."""
        return self.prefetcher.counts

    def report(self, counts: torch.Tensor) -> TierReport:
        """All that was counted, ``counts`` [5] on the host among it."""
        lookups, hits, fetched, prefetched, foreseen = counts.tolist()
        inward, outward = self._mover.counts[True], self._mover.counts[False]
        seconds = self._lane.seconds
        return TierReport(
            lookups=lookups,
            hits=hits,
            fetched_bytes=fetched * self._piece_bytes,
            prefetched=prefetched,
            prefetched_bytes=prefetched * self._piece_bytes,
            prefetch_hits=foreseen,
            out_bytes=outward.num_bytes,
            out_transfers=outward.num_transfers,
            out_seconds=seconds[False],
            in_bytes=inward.num_bytes,
            in_transfers=inward.num_transfers,
            in_seconds=seconds[True],
            stall_seconds=self._lane.stall_seconds,
        )
