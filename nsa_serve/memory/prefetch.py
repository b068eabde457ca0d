"""The host's pages that selections ask for, kept on the device by KV head: the hot blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch

from ..kernels.shapes import NEVER, UNCLAIMED, HotBlocks, PagedKV, StepBatch
from .device_pool import DevicePool

# A block that was all but selected is selected next time less often than one that was selected in
# one of the last steps, and more often than those used longer ago.
_RUNNER_UP_AGE = 4
_NEXT_STEP = -1


class SelectionPrefetcher:
    """Brings selected pages in, and keeps those of the last steps: most are selected again.

    Brought in beside the computation are the best ``num_ranked`` blocks of a decode step, which are
    those that it selects and some more (0: none), and after a prefill chunk what its last token
    selects, since the next chunk begins there and not all of the chunk's pages may have found room.

    The last ``num_hot`` page slots of the device pool are cut into pieces of one layer and KV head,
    and each (layer, head) keeps its own most recently selected blocks in its pieces. All tables are
    on the device and change there alone, so that a CUDA graph may hold every launch.
    """

    def __init__(
        self,
        pool: DevicePool,
        kv: list[PagedKV],
        *,
        num_hot: int,
        num_ranked: int,
        ops: ModuleType,
    ) -> None:
        layout = pool.layout
        self.kv = kv  # by layer, with the host's pages
        self.num_hot = num_hot
        self.num_ranked = num_ranked
        self._ops = ops
        self._device = pool.device
        tables = (layout.num_layers, layout.num_kv_heads)
        heads = layout.num_kv_heads
        self._places = self._full(-1, *tables, pool.num_blocks)
        self._last_used = self._full(NEVER, *tables, num_hot)
        self._order = self._full(0, *tables, num_hot)
        self._clock = self._full(0, 1)
        self.counts = self._full(0, 5, dtype=torch.int64)  # as of ``HotBlocks``
        self._owners = self._full(-1, *tables, num_hot)
        self._early = self._full(0, *tables, num_hot)
        claims, victims, fetched, num_fetched = self._scratch(heads, pool.num_blocks)
        self._layers = [
            HotBlocks(
                first_slot=pool.num_slots - num_hot,
                owners=self._owners[layer],
                places=self._places[layer],
                last_used=self._last_used[layer],
                early=self._early[layer],
                order=self._order[layer],
                clock=self._clock,
                claims=claims,
                victims=victims,
                fetched=fetched,
                num_fetched=num_fetched,
                counts=self.counts,
            )
            for layer in range(layout.num_layers)
        ]
        # Other layers are looked up at the same time.
        claims, victims, fetched, num_fetched = self._scratch(heads, pool.num_blocks)
        self._layers_ahead = [
            replace(hot, claims=claims, victims=victims, fetched=fetched, num_fetched=num_fetched)
            for hot in self._layers
        ]
        self._side = _side_stream(pool.device)
        self._in_use: list[torch.Tensor] = []  # by copies that computation has not waited for

    def begin(self) -> None:
        """A step whose selections may lie in host memory starts."""
        self._clock.add_(1)
        self._order.copy_(self._last_used.argsort(dim=-1, stable=True))

    def forget(self, block_ids: torch.Tensor) -> None:
        """The blocks [m] int64 hold other tokens now, or lie elsewhere."""
        self._places.index_fill_(2, block_ids, -1)

    def clear(self) -> None:
        """No block is hot. Nothing may be under way."""
        self._in_use.clear()
        for table in (self._places, self._owners):
            table.fill_(-1)
        self._last_used.fill_(NEVER)
        self._early.zero_()
        for hot in (self._layers[0], self._layers_ahead[0]):  # all layers share their scratch
            hot.claims.fill_(UNCLAIMED)

    def ensure_resident(
        self, batch: StepBatch, layer: int, selection: torch.Tensor
    ) -> torch.Tensor:
        """Slots [T, Hkv, n] where the ``selection`` of a layer is read."""
        slots: torch.Tensor = self._ops.fetch_blocks(
            selection, self.kv[layer], self._layers[layer], batch
        )
        return slots

    def room(self, batch: StepBatch) -> torch.Tensor | None:
        """Room [T, Hkv, m] for the blocks that a short step selects and the runners-up."""
        if not self.num_ranked or not batch.is_short:
            return None
        return self._full(-1, batch.num_tokens, self._places.shape[1], self.num_ranked)

    def prefetch(
        self, batch: StepBatch, layer: int, selection: torch.Tensor, ranked: torch.Tensor | None
    ) -> None:
        """Bring in, beside what is computed from here on, what the next step may select.

        That is a short step's ``ranked`` blocks [T, Hkv, m], or what the last tokens of a longer
        one's rows selected.
        """
        if ranked is not None:
            wanted, rows, age = ranked, batch.token_rows, _RUNNER_UP_AGE
        elif batch.is_short:
            return
        else:
            wanted = selection.index_select(0, batch.cu_seqlens_q[1:] - 1)
            rows = batch.once("rows", lambda: self._arange(batch.num_rows))
            age = _NEXT_STEP
        kv, hot = self.kv[layer], self._layers_ahead[layer]
        self._in_use += [wanted, rows]
        self._beside(lambda: self._ops.prefetch_blocks(wanted, rows, kv, hot, batch, age=age))

    def finish(self) -> None:
        """What is computed from here on comes after all that is being brought in."""
        if self._side is not None and self._in_use:
            torch.cuda.current_stream().wait_stream(self._side)
        self._in_use.clear()

    def _beside(self, job: Callable[[], None]) -> None:
        if self._side is None:
            job()
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            job()

    def _scratch(
        self, heads: int, num_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Claims, victims, fetched and num_fetched of ``HotBlocks``."""
        claims = self._full(UNCLAIMED, heads, num_blocks)
        victims, fetched = self._full(0, heads, self.num_hot), self._full(0, heads, self.num_hot)
        return claims, victims, fetched, self._full(0, heads)

    def _arange(self, count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=self._device)

    def _full(self, value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self._device)


def table_bytes(num_layers: int, num_kv_heads: int) -> int:
    """Bytes of a prefetcher's tables for each block of the cache."""
    return 4 * num_kv_heads * (num_layers + 2)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of its own on a GPU; a CPU computes one thing at a time."""
    if device.type != "cuda":
        return None
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
