"""What the passes over raw pages share: query tiles, pages as tiles of keys, gated epilogues."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contracts import check
from ..shapes import NSAShape, PagedKV, StepBatch

Tensor = torch.Tensor


def check_sparse(q: Tensor, kv: PagedKV, batch: StepBatch, nsa: NSAShape) -> None:
    """Raise ``ContractError`` unless ``q`` [T, Hq, Dk] fits the pages and the batch."""
    check(q.ndim == 3 and q.stride(2) == 1, "q must be [T, Hq, Dk] with unit last stride", q=q)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(q.shape[2] == kv.k.shape[3], "q and keys differ in Dk", q=q, k=kv.k)
    check(q.shape[1] % kv.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=kv.k)
    check(kv.k.shape[2] == nsa.page, "pages do not hold P tokens", k=kv.k, nsa=nsa)


def described(kv: PagedKV) -> bool:
    """Whether tensor descriptors can fetch the pages: 16-byte steps throughout."""
    return _in_steps(kv.k) and _in_steps(kv.v)


def _in_steps(pool: Tensor) -> bool:
    steps = (pool.data_ptr(), *(x * pool.element_size() for x in pool.stride()[:3]))
    return all(step % 16 == 0 for step in steps)


def page_operand(pool: Tensor, descriptors: bool) -> Any:
    """A pool [S, Hkv, P, D] as kernels take it: a descriptor of one head's page, or itself."""
    if not descriptors:
        return pool
    box = [1, 1, page_rows(pool.shape[2]), triton.next_power_of_2(pool.shape[3])]
    return TensorDescriptor(pool, list(pool.shape), list(pool.stride()), box)


def page_rows(page: int) -> int:
    """Rows of a tile that holds a page of keys."""
    return max(16, triton.next_power_of_2(page))


@triton.jit
def tier_of(device_ptr, host_ptr, slot, num_slots):
    """(pages, number among them) of a slot: those of the device, from ``num_slots`` on the host's.

    Both are strided alike.
    """
    away = slot >= num_slots
    return tl.where(away, host_ptr, device_ptr), tl.where(away, slot - num_slots, slot)


@triton.jit
def load_page(source, slot, head, stride_s, stride_h, stride_p, P: tl.constexpr,
              BP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              DESCRIPTORS: tl.constexpr):  # fmt: skip
    """One head's page [BP, BLOCK_D], unwritten tokens included."""
    if DESCRIPTORS:
        return source.load([slot, head, 0, 0]).reshape(BP, BLOCK_D)
    else:
        return load_tokens(source, slot, head, P, stride_s, stride_h, stride_p, P, BP, D, BLOCK_D)


@triton.jit
def load_tokens(source, slot, head, limit, stride_s, stride_h, stride_p, P: tl.constexpr,
                BP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One head's page [BP, BLOCK_D] through pointers; zeros from token ``limit`` on."""
    tokens = tl.arange(0, BP)
    dims = tl.arange(0, BLOCK_D)
    start = source + slot.to(tl.int64) * stride_s + head * stride_h
    pointers = start + tokens[:, None] * stride_p + dims[None, :]
    return tl.load(pointers, mask=(tokens < limit)[:, None] & (dims[None, :] < D), other=0.0)


@triton.jit
def load_queries(q_ptr, tokens, heads, valid, stride_t, stride_h, D: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Queries [BM, BLOCK_D] of these tokens and heads; zeros where not ``valid``."""
    dims = tl.arange(0, BLOCK_D)
    return tl.load(
        q_ptr + tokens.to(tl.int64)[:, None] * stride_t + heads[:, None] * stride_h + dims,
        mask=valid[:, None] & (dims[None, :] < D),
        other=0.0,
    )


@triton.jit
def load_gates(gates_ptr, tokens, heads, branch, valid, stride_t, stride_h, stride_c):
    """The gate of one branch [BM] fp32: 0 compressed, 1 selected, 2 window."""
    place = gates_ptr + tokens.to(tl.int64) * stride_t + heads * stride_h + branch * stride_c
    return tl.sigmoid(tl.load(place, mask=valid, other=0.0).to(tl.float32))
