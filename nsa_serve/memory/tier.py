"""The host tier of one device's cache: its pages, the copies to and from it, the hot blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..kernels.dispatch import ops_for
from ..kernels.shapes import StepBatch
from ..models.step import StepInputs
from ..schedule.plan import ResidenceUpdate, TierReport
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
        self._due: dict[int, int] = {}  # slots by block that the table doesn't have yet

    def apply(self, update: ResidenceUpdate) -> None:
        """Queue the copies of an update and change the slot table, before the step's kernels.

        Where that fails for want of memory, the next call changes the table for both.
        """
        self._due.update(update.slots)
        self._mover.start(update)
        if not self._due:
            return
        packed = torch.from_numpy(np.array(list(self._due.items()), np.int64).T.copy())
        if self.pool.device.type == "cuda":
            packed = packed.pin_memory().to(self.pool.device, non_blocking=True)
        block_ids, slots = packed
        self.pool.slot_table.index_copy_(0, block_ids, slots.int())
        self.prefetcher.forget(block_ids)
        self._due.clear()

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
