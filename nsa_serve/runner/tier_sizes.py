"""How a device's cache memory and the host's are divided between pages, hot blocks and tables."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..kernels.shapes import NSAShape
from ..memory.layout import KVLayout
from ..memory.prefetch import table_bytes
from .budget import shown

# What the link to the host needs for its full rate (51 GB/s of an H200's 55).
_TRANSFER = 2 << 20
# Of the device's pages, at most one in so many is cut up for hot blocks.
_HOT_SHARE = 4
# Twice what a token selects: then 97 to 99 % of look-ups of host pages were hot in real text.
_HOT_STEPS = 2


@dataclass(frozen=True, slots=True)
class TierSize:
    """Pages of both tiers, and which of a request's pages always stay on the device."""

    num_pages: int  # on the device
    num_hot: int  # page slots behind them, for hot blocks
    num_host: int
    slab: int  # host pages of one copy
    num_initial: int  # first pages of a request that stay
    num_near: int  # tokens before the one being computed whose pages stay

    @property
    def num_blocks(self) -> int:
        """One place stays free, so that two pages can change places."""
        return self.num_pages + self.num_host - 1

    @property
    def num_slots(self) -> int:
        """Page slots of the device pool."""
        return self.num_pages + self.num_hot


def transfer_pages(layout: KVLayout) -> int:
    """Neighbouring pages that make one copy over the link."""
    return -(-_TRANSFER // layout.bytes_per_slot)


def size_tiers(
    num_bytes: int,
    host_bytes: int,
    layout: KVLayout,
    nsa: NSAShape,
    *,
    max_num_seqs: int,
    token_budget: int,
) -> TierSize:
    """Tiers of ``num_bytes`` on the device, where all compressed entries stay, and ``host_bytes``.

    Raises ``ConfigError`` where the host's memory holds no transfer, or the device's not all that a
    step may need at once.
    """
    slot = layout.bytes_per_slot
    slab = transfer_pages(layout)
    num_host = host_bytes // (slab * slot) * slab
    if not num_host:
        raise ConfigError(
            f"--kv-host-memory-bytes {host_bytes} holds no transfer of {slab} pages, "
            f"{shown(slab * slot)}: raise it, or leave it out"
        )
    per_block = layout.compressed_bytes_per_block
    per_block += table_bytes(layout.num_layers, layout.num_kv_heads)
    num_slots = max(0, num_bytes - (num_host - 1) * per_block) // (slot + per_block)
    wanted = _HOT_STEPS * nsa.num_selected * max_num_seqs
    num_hot = max(1, min(wanted, num_slots // _HOT_SHARE))
    num_near = max(nsa.window, nsa.compress_len, (nsa.num_local - 1) * nsa.page + 1) - 1
    size = TierSize(num_slots - num_hot, num_hot, num_host, slab, nsa.num_initial, num_near)
    needed = nsa.num_initial + layout.num_pages(token_budget + num_near) + 2
    if size.num_pages < needed:
        raise ConfigError(
            f"a step of {token_budget} tokens needs {needed} pages on the device, and beside the "
            f"compressed entries of {num_host} host pages its cache of {shown(num_bytes)} holds "
            f"{max(0, size.num_pages)}: raise --kv-cache-memory-bytes, or lower "
            "--max-num-batched-tokens or --kv-host-memory-bytes"
        )
    return size
