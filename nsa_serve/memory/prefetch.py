"""The host's pages that selections ask for, kept on the device by KV head: the hot blocks."""

from __future__ import annotations

from types import ModuleType

import torch

from ..kernels.shapes import UNCLAIMED, HotBlocks, PagedKV, StepBatch
from .device_pool import DevicePool


class SelectionPrefetcher:
    """Brings selected pages in, and keeps those of the last steps: most are selected again.

    The last ``num_hot`` page slots of the device pool are cut into pieces of one layer and KV head,
    and each (layer, head) keeps its own most recently selected blocks in its pieces. All tables are
    on the device and change there alone, so that a CUDA graph may hold every launch.
    """

    def __init__(
        self, pool: DevicePool, kv: list[PagedKV], *, num_hot: int, ops: ModuleType
    ) -> None:
        layout = pool.layout
        self.kv = kv  # by layer, with the host's pages
        self.num_hot = num_hot
        self._ops = ops
        self._device = pool.device
        tables = (layout.num_layers, layout.num_kv_heads)
        heads = layout.num_kv_heads
        self._places = self._full(-1, *tables, pool.num_blocks)
        self._last_used = self._full(0, *tables, num_hot)
        self._order = self._full(0, *tables, num_hot)
        self._clock = self._full(0, 1)
        self.counts = self._full(0, 3, dtype=torch.int64)  # look-ups, hits, pieces fetched
        owners = self._full(-1, *tables, num_hot)
        claims = self._full(UNCLAIMED, heads, pool.num_blocks)
        victims, fetched = self._full(0, heads, num_hot), self._full(0, heads, num_hot)
        num_fetched = self._full(0, heads)
        self._layers = [
            HotBlocks(
                first_slot=pool.num_slots - num_hot,
                owners=owners[layer],
                places=self._places[layer],
                last_used=self._last_used[layer],
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

    def begin(self) -> None:
        """A step whose selections may lie in host memory starts."""
        self._clock.add_(1)
        self._order.copy_(self._last_used.argsort(dim=-1, stable=True))

    def forget(self, block_ids: torch.Tensor) -> None:
        """The blocks [m] int64 hold other tokens now, or lie elsewhere."""
        self._places.index_fill_(2, block_ids, -1)

    def ensure_resident(
        self, batch: StepBatch, layer: int, selection: torch.Tensor
    ) -> torch.Tensor:
        """Slots [T, Hkv, n] where the ``selection`` of a layer is read."""
        slots: torch.Tensor = self._ops.fetch_blocks(
            selection, self.kv[layer], self._layers[layer], batch
        )
        return slots

    def _full(self, value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self._device)


def table_bytes(num_layers: int, num_kv_heads: int) -> int:
    """Bytes of a prefetcher's tables for each block of the cache."""
    return 4 * num_kv_heads * (num_layers + 1)
