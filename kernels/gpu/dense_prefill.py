"""Dense attention of rows with many tokens: query tiles against every page they see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shapes import PagedKV, StepBatch
from .context_splits import LOG2_E
from .dense_decode import page_slots
from .online_softmax import fold_top, fold_values, normalised
from .query_tiles import locate_tile, num_query_tiles
from .tuning import Tile, dense_tile

Tensor = torch.Tensor


def attend_long_rows(
    q: Tensor,
    kv: PagedKV,
    batch: StepBatch,
    out: Tensor,
    *,
    shortest: int,
    tile: Tile | None = None,
) -> None:
    """Fill ``out`` [T, Hq, Dv] for rows of at least ``shortest`` tokens, and with 0 at padding."""
    (num_tokens, hq, dk), hkv, dv = q.shape, kv.k.shape[1], kv.v.shape[3]
    tile = tile or dense_tile(hq // hkv, max(dk, dv))
    num_tiles = num_query_tiles(num_tokens, batch.num_rows, tile.tokens)
    _tiles_kernel[(num_tiles * hkv,)](
        q, kv.k, kv.v, batch.slot_table, batch.positions, batch.cu_seqlens_q, out,
        LOG2_E / dk**0.5, num_tokens, batch.num_rows, num_tiles,
        q.stride(0), q.stride(1), batch.slot_table.stride(0),
        *kv.k.stride()[:3], *kv.v.stride()[:3],
        HKV=hkv, G=hq // hkv, DK=dk, DV=dv,
        BLOCK_DK=triton.next_power_of_2(dk), BLOCK_DV=triton.next_power_of_2(dv),
        PAGE=kv.k.shape[2], SHORTEST=shortest, BT=tile.tokens, BM=tile.rows, BN=tile.keys,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _load_keys(pool, slots, keys, head, limit, stride_s, stride_h, stride_p, D: tl.constexpr,
               BLOCK_D: tl.constexpr, PAGE: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Keys or values [BN, BLOCK_D]; unless WHOLE, zeros from key ``limit`` on."""
    dims = tl.arange(0, BLOCK_D)
    at = slots.to(tl.int64) * stride_s + head * stride_h + keys % PAGE * stride_p
    pointers = pool + at[:, None] + dims[None, :]
    if WHOLE and (D == BLOCK_D):
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(keys < limit)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles", "table_stride"])
def _tiles_kernel(
    q_ptr,  # [T, Hq, Dk]
    k_ptr,  # [S, Hkv, P, Dk]
    v_ptr,  # [S, Hkv, P, Dv]
    table_ptr,  # [B, M]
    positions_ptr,
    cu_ptr,
    out_ptr,  # [T, Hq, Dv]
    scale,
    num_tokens,
    num_rows,
    num_tiles,
    q_stride_t,
    q_stride_h,
    table_stride,
    k_stride_s,
    k_stride_h,
    k_stride_p,
    v_stride_s,
    v_stride_h,
    v_stride_p,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,
    SHORTEST: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BT tokens x G heads against all keys they see; rows are token-major."""
    # A prompt's last tiles see the most keys: they start first, so that none runs alone at the end.
    tile = num_tiles - 1 - tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    row, token0, end = locate_tile(cu_ptr, tile, num_rows, num_tokens, BT)
    if token0 >= end:
        return
    if (row < num_rows) & (end - tl.load(cu_ptr + row) < SHORTEST):
        return
    members = tl.arange(0, BM)
    tokens = token0 + members // G
    heads = head * G + members % G
    valid = (members < BT * G) & (tokens < end)
    positions = tl.load(positions_ptr + tokens, mask=valid, other=-1).to(tl.int32)
    dims_k = tl.arange(0, BLOCK_DK)
    q = tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims_k,
        mask=valid[:, None] & (dims_k[None, :] < DK),
        other=0.0,
    )  # [BM, BLOCK_DK]
    most = tl.load(positions_ptr + tl.minimum(token0 + BT, end) - 1).to(tl.int32) + 1
    # Tiles of keys that even the first token sees whole need no mask.
    full = (tl.load(positions_ptr + token0).to(tl.int32) + 1) // BN * BN
    table = table_ptr + row.to(tl.int64) * table_stride
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    offsets = tl.arange(0, BN)
    upcoming = page_slots(table, offsets, most, PAGE, BN)
    for first in tl.range(0, full, BN, num_stages=STAGES):
        slots, keys = upcoming, first + offsets
        # Read one turn ahead: a page's address is known when its turn comes.
        upcoming = page_slots(table, keys + BN, most, PAGE, BN)
        k = _load_keys(k_ptr, slots, keys, head, most, k_stride_s, k_stride_h, k_stride_p,
                       DK, BLOCK_DK, PAGE, True)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BN]
        p, alpha, top, total = fold_top(s, scale, top, total)
        v = _load_keys(v_ptr, slots, keys, head, most, v_stride_s, v_stride_h, v_stride_p,
                       DV, BLOCK_DV, PAGE, True)  # fmt: skip
        acc = fold_values(p, v, alpha, acc)
    for first in tl.range(full, most, BN, num_stages=1):
        keys = first + offsets
        slots = page_slots(table, keys, most, PAGE, BN)
        k = _load_keys(k_ptr, slots, keys, head, most, k_stride_s, k_stride_h, k_stride_p,
                       DK, BLOCK_DK, PAGE, False)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")
        s = tl.where(keys[None, :] <= positions[:, None], s, float("-inf"))
        p, alpha, top, total = fold_top(s, scale, top, total)
        v = _load_keys(v_ptr, slots, keys, head, most, v_stride_s, v_stride_h, v_stride_p,
                       DV, BLOCK_DV, PAGE, False)  # fmt: skip
        acc = fold_values(p, v, alpha, acc)
    dims_v = tl.arange(0, BLOCK_DV)
    place = tokens.to(tl.int64) * (HKV * G) + heads
    written = valid[:, None] & (dims_v[None, :] < DV)
    out = normalised(total, acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * DV + dims_v, out, mask=written)
