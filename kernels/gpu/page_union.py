"""The pages that a query tile's tokens select, each once, with the tokens that want it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..contracts import check
from ..shapes import NSAShape, StepBatch
from .query_tiles import locate_tile, num_query_tiles
from .tuning import union_warps

Tensor = torch.Tensor

# One listed page in 63 bits: block | tokens that select it | device slot.
SLOT_BITS = tl.constexpr(24)
TOKEN_BITS = tl.constexpr(16)
SLOT_MASK = tl.constexpr(2**24 - 1)
TOKEN_MASK = tl.constexpr(2**16 - 1)
MAX_TILE_TOKENS = 16
_LAST = tl.constexpr(2**63 - 1)


@dataclass(frozen=True, slots=True)
class PageUnion:
    """Per query tile and KV head: far pages in ascending order, and bits of the near ones.

    Near pages reach from the tile's first token's page to its last token's page; they need masks,
    far ones do not.
    """

    items: Tensor  # [tiles, Hkv, BT·n rounded up] int64
    counts: Tensor  # [tiles, Hkv] int32, items in use
    near_bits: Tensor  # [tiles, Hkv, near] int32, bit b: token b of the tile selects the page

    def check_tiles(self, num_tiles: int) -> None:
        """Raise ``ContractError`` unless it was made for so many tiles."""
        same = self.items.shape[0] == num_tiles
        check(same, "pages were listed for other tiles", items=self.items, tiles=num_tiles)


def num_near_pages(tile_tokens: int, page: int) -> int:
    """Most pages on which ``tile_tokens`` neighbours can lie."""
    return (tile_tokens - 2) // page + 2


def unite_pages(
    selection: Tensor,
    slots: Tensor | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    tile_tokens: int,
) -> PageUnion:
    """Pages of every tile of ``tile_tokens`` from ``selection`` [T, Hkv, n]."""
    check(tile_tokens <= MAX_TILE_TOKENS, "a page has too few token bits", tokens=tile_tokens)
    num_tokens, num_kv_heads, num_selected = selection.shape
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile_tokens)
    width = triton.next_power_of_2(tile_tokens * num_selected)
    near = triton.next_power_of_2(num_near_pages(tile_tokens, nsa.page))
    int32 = {"dtype": torch.int32, "device": selection.device}
    union = PageUnion(
        items=torch.empty(
            num_tiles, num_kv_heads, width, dtype=torch.int64, device=selection.device
        ),
        counts=torch.empty(num_tiles, num_kv_heads, **int32),
        near_bits=torch.empty(num_tiles, num_kv_heads, near, **int32),
    )
    _unite_kernel[(num_tiles, num_kv_heads)](
        selection,
        selection if slots is None else slots,
        batch.slot_table,
        batch.positions,
        batch.cu_seqlens_q,
        union.items,
        union.counts,
        union.near_bits,
        num_tokens,
        batch.num_rows,
        batch.slot_table.stride(0),
        HKV=num_kv_heads,
        P=nsa.page,
        N=num_selected,
        BLOCK_N=triton.next_power_of_2(num_selected),
        BT=tile_tokens,
        ITEMS=width,
        NEAR=near,
        RESOLVED=slots is not None,
        num_warps=union_warps(width),
    )
    return union


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def _unite_kernel(
    selection_ptr,
    slots_ptr,
    table_ptr,
    positions_ptr,
    cu_ptr,
    items_ptr,
    counts_ptr,
    near_ptr,
    num_tokens,
    num_rows,
    table_stride,
    HKV: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BT: tl.constexpr,
    ITEMS: tl.constexpr,
    NEAR: tl.constexpr,
    RESOLVED: tl.constexpr,
):
    """One tile and KV head."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    line = tile.to(tl.int64) * HKV + head
    near_first = tl.maximum(tl.load(positions_ptr + token0).to(tl.int32), 0) // P
    entries = tl.arange(0, ITEMS)
    owners = entries // N
    read = (owners < BT) & (token0 + owners < end)
    source = ((token0 + owners).to(tl.int64) * HKV + head) * N + entries % N
    blocks = tl.load(selection_ptr + source, mask=read, other=-1)
    columns = tl.arange(0, BLOCK_N)
    near = near_first + tl.arange(0, NEAR)
    bits = tl.zeros([ITEMS], tl.int32)
    near_bits = tl.zeros([NEAR], tl.int32)
    repeated = tl.zeros([ITEMS], tl.int32)
    for token in range(BT):
        theirs = tl.load(
            selection_ptr + ((token0 + token).to(tl.int64) * HKV + head) * N + columns,
            mask=(columns < N) & (tl.zeros([BLOCK_N], tl.int32) + token0 + token < end),
            other=-1,
        )  # [BLOCK_N]
        shared = tl.max((blocks[:, None] == theirs[None, :]).to(tl.int32), 1)
        bits |= shared << token
        repeated |= shared & (token < owners).to(tl.int32)
        near_bits |= tl.max((near[:, None] == theirs[None, :]).to(tl.int32), 1) << token
    far = (blocks >= 0) & (blocks < near_first) & (repeated == 0)
    if RESOLVED:
        slots = tl.load(slots_ptr + source, mask=far, other=-1)
    else:
        slots = tl.load(table_ptr + row.to(tl.int64) * table_stride + blocks, mask=far, other=-1)
    far = far & (slots >= 0)
    item = (blocks.to(tl.int64) << (SLOT_BITS + TOKEN_BITS)) | (bits.to(tl.int64) << SLOT_BITS)
    item = tl.sort(tl.where(far, item | slots.to(tl.int64), _LAST))
    tl.store(items_ptr + line * ITEMS + entries, item)
    tl.store(counts_ptr + line, tl.sum(far.to(tl.int32), 0))
    tl.store(near_ptr + line * NEAR + tl.arange(0, NEAR), near_bits)
