"""The cache's bytes on one device, and where each block's raw page lies among them."""

from __future__ import annotations

import torch

from ..kernels.shapes import CompressedKV, PagedKV
from .large_pages import allocate_large
from .layout import KVLayout


class DevicePool:
    """Raw pages by slot and compressed entries by block id, allocated once.

    Memory is not cleared: whoever reads, reads only what was written. On a CPU the pool may be the
    first part of one piece of memory with a host tier's ``num_host`` pages behind it.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_slots: int,
        num_blocks: int,
        device: torch.device | str,
        *,
        num_host: int = 0,
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        whole = self._allocate(layout.raw_elements(num_slots + num_host))
        self._raw, self.behind = whole.split_with_sizes(
            [layout.raw_elements(num_slots), layout.raw_elements(num_host)]
        )
        self.moves = num_slots != num_blocks  # whether blocks change their slots
        self._compressed = self._allocate(layout.compressed_elements(num_blocks))
        layers = range(layout.num_layers)
        # By layer; a dense model has no compressed entries.
        self.kv: list[PagedKV] = [layout.paged_view(self._raw, layer) for layer in layers]
        self.compressed: list[CompressedKV] | None = None
        if layout.entries_per_page:
            self.compressed = [layout.compressed_view(self._compressed, at) for at in layers]
        ids = torch.arange(num_blocks, dtype=torch.int32, device=self.device)
        self.slot_table = ids.masked_fill(ids >= num_slots, -1)  # [N] int32, slot of each block

    @property
    def pages(self) -> torch.Tensor:
        """Whole raw pages [slots, values of a page]."""
        return self._raw.view(self.num_slots, self.layout.slot_elements)

    @property
    def entries(self) -> torch.Tensor:
        """All compressed entries [layers, blocks, values of a block in a layer]."""
        layers = self.layout.num_layers
        size = self.layout.entry_elements // layers
        return self._compressed.view(layers, self.num_blocks, size)

    @property
    def num_bytes(self) -> int:
        return (self._raw.numel() + self._compressed.numel()) * self.layout.dtype.itemsize

    def slots_of(self, block_table: torch.Tensor) -> torch.Tensor:
        """Device slots of ``block_table`` [B, M] int32; −1 stays −1."""
        if not self.moves:
            return block_table  # every block has the slot of its own number
        slots = self.slot_table[block_table.clamp(min=0)]
        return torch.where(block_table >= 0, slots, -1)

    def poison(self) -> None:
        """Fill everything with NaN, so that a read of what nobody wrote shows."""
        self._raw.fill_(torch.nan)
        self._compressed.fill_(torch.nan)

    def _allocate(self, num_elements: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return allocate_large(num_elements, self.layout.dtype)
        return torch.empty(num_elements, dtype=self.layout.dtype, device=self.device)
