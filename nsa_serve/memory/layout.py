"""The order of bytes in the cache pools. Nothing else knows it; everyone reads strided views.

Raw pool, block-major: ``[slot, layer, Hkv, K|V, P, D]``. A page of all layers is one run, which a
host tier moves in one copy, and a head's piece of a layer is one run, which a gather fetches.
Compressed pool: ``[layer, block, Hkv, K|V, P/d, D]``, by block id. Both are flat, so that Dk and Dv
may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.shapes import CompressedKV, PagedKV
from ..models.config import ModelConfig

# Tokens of a page of a dense model, which has no selection blocks to prescribe it.
DENSE_PAGE = 64


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Sizes of one model's cache; sizes named ``*_elements`` count values, ``bytes_*`` bytes."""

    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    page: int  # P
    entries_per_page: int  # P/d; 0 for a dense model
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelConfig, dtype: torch.dtype) -> KVLayout:
        """The layout of ``model``'s cache, its values kept as ``dtype``."""
        shape = model.nsa.shape if model.nsa else None
        return cls(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim_k=model.head_dim_k,
            head_dim_v=model.head_dim_v,
            page=shape.page if shape else DENSE_PAGE,
            entries_per_page=shape.entries_per_page if shape else 0,
            dtype=dtype,
        )

    @property
    def bytes_per_slot(self) -> int:
        """Raw K/V of one page, all layers."""
        return self.slot_elements * self.dtype.itemsize

    @property
    def compressed_bytes_per_block(self) -> int:
        """Compressed entries of one page, all layers; 0 for a dense model."""
        return self.entry_elements * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """A page with its compressed entries, all layers."""
        return self.bytes_per_slot + self.compressed_bytes_per_block

    @property
    def entry_elements(self) -> int:
        """Values of the compressed entries of one page, all layers."""
        return self.num_layers * self._compressed_layer_elements

    @property
    def slot_elements(self) -> int:
        """Values of the raw K/V of one page, all layers."""
        return self.num_layers * self._layer_elements

    def num_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page)

    def raw_elements(self, num_slots: int) -> int:
        """Length of the flat raw pool."""
        return num_slots * self.slot_elements

    def compressed_elements(self, num_blocks: int) -> int:
        """Length of the flat compressed pool."""
        return self.num_layers * num_blocks * self._compressed_layer_elements

    def paged_view(self, raw: torch.Tensor, layer: int) -> PagedKV:
        """One layer of the flat raw pool: k [S, Hkv, P, Dk] and v [S, Hkv, P, Dv]."""
        num_slots = raw.numel() // self.slot_elements
        offset = layer * self._layer_elements
        return PagedKV(*self._split(raw, num_slots, self.page, self.slot_elements, offset))

    def compressed_view(self, pool: torch.Tensor, layer: int) -> CompressedKV:
        """One layer of the flat compressed pool: k [N, Hkv, P/d, Dk] and v [N, Hkv, P/d, Dv]."""
        stride = self._compressed_layer_elements
        num_blocks = pool.numel() // (self.num_layers * stride)
        offset = layer * num_blocks * stride
        return CompressedKV(*self._split(pool, num_blocks, self.entries_per_page, stride, offset))

    @property
    def _layer_elements(self) -> int:
        return self.num_kv_heads * self.page * (self.head_dim_k + self.head_dim_v)

    @property
    def _compressed_layer_elements(self) -> int:
        return self.num_kv_heads * self.entries_per_page * (self.head_dim_k + self.head_dim_v)

    def _split(
        self, flat: torch.Tensor, count: int, length: int, stride: int, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of ``count`` pieces of ``length`` tokens or entries, ``stride`` values apart."""
        dk, dv = self.head_dim_k, self.head_dim_v
        offset += int(flat.storage_offset())
        head = length * (dk + dv)
        shape = (count, self.num_kv_heads, length)
        k = flat.as_strided((*shape, dk), (stride, head, dk, 1), offset)
        v = flat.as_strided((*shape, dv), (stride, head, dv, 1), offset + length * dk)
        return k, v
