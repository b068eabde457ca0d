"""Dense attention of rows with many tokens by xformers, over K/V gathered from the pages.

xformers takes block-diagonal causal masks, but its flash kernels take no paged cache: keys and
values of a row are copied side by side first, which costs little beside attention to them. The
lengths have to be known on the host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from ..shapes import PagedKV, StepBatch

Tensor = torch.Tensor
RowLens = tuple[tuple[int, int], ...]  # (tokens, context) of each row
Attention = Callable[[Tensor, Tensor, Tensor, RowLens], Tensor]

logger = logging.getLogger(__name__)


@cache
def find_xformers() -> Attention | None:
    """Attention by xformers if its CUDA part loads and runs here; else None. Logged, once."""
    try:
        _load_cuda_runtime()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its optional parts
            importlib.import_module("xformers.ops")
        probe = torch.zeros(1, 8, 1, 1, 64, dtype=torch.float16, device="cuda")
        attend_blocks(probe[0, :, 0], probe[0, :, 0], probe[0, :, 0], ((8, 8),))
    except Exception as error:
        # Whatever it is that fails in a foreign library, our own kernel serves.
        logger.info("dense prefill runs in Triton (xformers: %s)", str(error).split("\n")[0])
        return None
    logger.info("dense prefill runs in xformers")
    return attend_blocks


def _load_cuda_runtime() -> None:
    """Load libcudart.so.12, which xformers' wheel links, where a package brings it along."""
    spec = importlib.util.find_spec("nvidia.cuda_runtime")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        library = Path(folder, "lib", "libcudart.so.12")
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@lru_cache(maxsize=8)
def _mask(rows: RowLens, device: torch.device) -> Any:
    """The mask of a step: all its layers share it."""
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    return bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        [tokens for tokens, _ in rows], [context for _, context in rows], device=device
    )


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, rows: RowLens) -> Tensor:
    """Causal attention of each row's ``q`` [t, Hq, D] over its ``k``, ``v`` [c, Hkv, D]."""
    ops = importlib.import_module("xformers.ops")
    num_kv_heads = k.shape[1]
    grouped = q.unflatten(1, (num_kv_heads, -1))  # [t, Hkv, G, D]
    shape = (-1, -1, grouped.shape[2], -1)
    out = ops.memory_efficient_attention_forward(
        grouped[None],
        k[:, :, None].expand(shape)[None],
        v[:, :, None].expand(shape)[None],
        attn_bias=_mask(rows, q.device),
    )
    return out[0].flatten(1, 2)


def serves(q: Tensor, kv: PagedKV, batch: StepBatch) -> bool:
    """Whether lengths are known, and types and dimensions are ones that flash kernels take."""
    same = q.dtype == kv.k.dtype and kv.k.shape[3] == kv.v.shape[3]
    return bool(
        batch.row_lens is not None
        and q.is_cuda
        and same
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 256
    )


def attend_varlen(
    q: Tensor, kv: PagedKV, batch: StepBatch, out: Tensor, attention: Attention, *, shortest: int
) -> None:
    """Fill ``out`` [T, Hq, Dv] for rows of at least ``shortest`` tokens, and with 0 at padding."""
    assert batch.row_lens is not None
    spans, rows, end = [], [], 0
    for row, (tokens, context) in enumerate(batch.row_lens):
        if tokens >= shortest:
            spans.append(slice(end, end + tokens))
            rows.append((row, context))
        end += tokens
    if end < out.shape[0]:
        out[end:] = 0
    k, v = gather_rows(kv, batch.slot_table, rows)
    lens = tuple((span.stop - span.start, c) for span, (_, c) in zip(spans, rows, strict=True))
    found = attention(torch.cat([q[span] for span in spans]), k, v, lens)
    for span, part in zip(spans, found.split([tokens for tokens, _ in lens]), strict=True):
        out[span] = part


def gather_rows(
    kv: PagedKV, slot_table: Tensor, rows: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Keys [c, Hkv, Dk] and values [c, Hkv, Dv] of (row, context) after (row, context)."""
    page = kv.k.shape[2]
    slots, offsets = [], []
    for row, context in rows:
        tokens = torch.arange(context, device=slot_table.device)
        slots.append(slot_table[row][tokens // page].long())
        offsets.append(tokens % page)
    slot, offset = torch.cat(slots), torch.cat(offsets)
    return kv.k[slot, :, offset], kv.v[slot, :, offset]
