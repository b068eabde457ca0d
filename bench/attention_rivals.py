"""Full attention by torch and xformers over contiguous K/V, for the same heads and lengths."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.gpu.varlen_prefill import find_xformers
from .measure import Timing, time_device, time_graph
from .synthetic import Case

Tensor = torch.Tensor
_BACKENDS = (
    ("full, torch SDPA flash", SDPBackend.FLASH_ATTENTION),
    ("full, torch SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
)
# Of one graph: what a launch of the graph costs is shared by as many.
_DECODES = 8

logger = logging.getLogger(__name__)


def rival_prefill(case: Case) -> Iterator[tuple[str, Timing]]:
    """Full causal attention of one prompt over contiguous K/V of the same heads."""
    length, groups = case.batch.num_tokens, case.shape.group_size
    repeats = 5 if length >= 32768 else 10
    q = case.q.transpose(0, 1)[None]
    k, v = (t.transpose(0, 1)[None].repeat_interleave(groups, 1) for t in (case.k, case.v))
    for name, backend in _BACKENDS:
        with sdpa_kernel(backend):
            yield (
                name,
                time_device(
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                    repeats=repeats,
                    warmup=2,
                ),
            )
    attend = find_xformers()
    if attend is not None:
        rows = ((length, length),)
        run = lambda: attend(case.q, case.k, case.v, rows)  # noqa: E731
        yield "full, xformers", time_device(run, repeats=repeats, warmup=2)


def rival_decode(case: Case) -> Iterator[tuple[str, Timing]]:
    """One query per request over contiguous K/V, grouped heads: cuDNN, and xformers' split-K."""
    rows, length = case.batch.num_rows, case.batch.max_context_len
    heads = case.shape.num_kv_heads
    q = case.q[:, :, None]  # [B, Hq, 1, D]
    k, v = (
        torch.randn(rows, heads, length, dim, device="cuda", dtype=case.q.dtype)
        for dim in (case.shape.head_dim_k, case.shape.head_dim_v)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attend = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
        yield "full, torch SDPA cuDNN", time_graph([attend] * _DECODES)
    if find_xformers() is None:
        return
    split = _xformers_split(case.q, k, v)
    try:
        yield "full, xformers split-K", time_graph([split] * _DECODES)
    except Exception as error:
        # Its Triton kernel is compiled by whatever Triton is installed.
        logger.warning("xformers' split-K does not run here: %s", str(error).split("\n")[0])


def _xformers_split(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """q [B, Hq, D] over k, v [B, Hkv, L, D], kept as xformers reads them: [B, L, Hkv, G, D]."""
    fmha = importlib.import_module("xformers.ops.fmha")
    heads = k.shape[1]
    grouped = q.view(q.shape[0], 1, heads, -1, q.shape[2])  # [B, 1, Hkv, G, D]
    shape = (-1, -1, -1, grouped.shape[3], -1)
    keys, values = (t.transpose(1, 2).contiguous()[:, :, :, None].expand(shape) for t in (k, v))

    def run() -> Tensor:
        out: Tensor = fmha.memory_efficient_attention_forward(
            grouped, keys, values, op=fmha.triton_splitk.FwOp
        )
        return out

    return run
