"""Attention in training against torch SDPA: forward, backward and peak memory of one layer.

One sequence of T tokens, bf16. Ours includes the compression, all three branches, the selection and
the gates. Gradients are checked against the fp64 twin before anything is timed, on a sequence short
enough that every block is selected: nothing then hangs on near ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import dispatch
from ..kernels.shapes import Compressor, NSAShape
from ..kernels.training.attention import nsa_attention
from ..kernels.training.packed import PackedBatch
from .kernels import Row, must_agree
from .measure import peak_bytes, time_device
from .synthetic import AttentionShape, local_selection

Tensor = torch.Tensor
# How much of its neighbour's free choices a token keeps: none (worst), and as a trained model.
LOCALITIES = (0.0, 0.7)
RIVALS = (
    ("full, torch SDPA flash", SDPBackend.FLASH_ATTENTION),
    ("full, torch SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
)


def training_rows(shape: AttentionShape, nsa: NSAShape, length: int) -> Iterator[Row]:
    """Forward and backward over one sequence of ``length`` tokens, a multiple of P."""
    error = check_gradients(shape, nsa)
    leaves, d_out = make_leaves(shape, length)
    batch = PackedBatch.build([length], nsa=nsa, device="cuda")
    q, k, v, gates = leaves
    attend = partial(nsa_attention, q, k, v, gates, batch, nsa=nsa, compressor=Compressor())
    for keep in LOCALITIES:
        selection = local_selection(batch.positions, shape.num_kv_heads, nsa, keep)
        run = partial(attend, selection=selection)
        for row in _timed(f"NSA, {keep:.0%} local", run, leaves, d_out, length):
            yield replace(row, error=error)
    turned = [x.detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
    for name, backend in RIVALS:
        full = partial(_full, *turned, backend=backend)
        yield from _timed(name, full, turned, d_out.transpose(0, 1)[None], length)


def make_leaves(shape: AttentionShape, length: int) -> tuple[list[Tensor], Tensor]:
    """Random q, k, v and gate logits that want gradients, and a gradient of the output."""

    def normal(*size: int) -> Tensor:
        return torch.randn(length, *size, device="cuda", dtype=torch.bfloat16)

    leaves = [
        normal(shape.num_q_heads, shape.head_dim_k),
        normal(shape.num_kv_heads, shape.head_dim_k),
        normal(shape.num_kv_heads, shape.head_dim_v),
        normal(shape.num_q_heads, 3),
    ]
    return [x.requires_grad_() for x in leaves], normal(shape.num_q_heads, shape.head_dim_v)


def check_gradients(shape: AttentionShape, nsa: NSAShape) -> float:
    """The largest relative error of output and gradients; raises where one is wrong."""
    leaves, d_out = make_leaves(shape, nsa.dense_len)
    batch = PackedBatch.build([nsa.dense_len], nsa=nsa, device="cuda")
    attend = partial(nsa_attention, batch=batch, nsa=nsa, compressor=Compressor())
    out = attend(*leaves)
    found = (out, *torch.autograd.grad(out, leaves, d_out))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with dispatch.use("reference"):
        wanted_out = attend(*exact)
    wanted = (wanted_out, *torch.autograd.grad(wanted_out, exact, d_out.double()))
    names = ("output", "dq", "dk", "dv", "d_gates")
    return max(
        must_agree(name, one.detach(), other.detach())
        for name, one, other in zip(names, found, wanted, strict=True)
    )


def _full(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _timed(
    name: str, attend: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor, length: int
) -> Iterator[Row]:
    """Forward, and backward with the peak of both: inputs, gradients and what lies between."""
    repeats = 3 if length >= 32768 else 10
    timing = time_device(attend, repeats=repeats, warmup=1)
    yield Row("training", f"{name}, forward", 1, length, timing)
    peak = peak_bytes(lambda: torch.autograd.grad(attend(), leaves, d_out))
    out = attend()
    backward = partial(torch.autograd.grad, out, leaves, d_out, retain_graph=True)
    timing = time_device(backward, repeats=repeats, warmup=1)
    inputs = sum(x.nbytes for x in (*leaves, d_out))
    yield Row("training", f"{name}, backward", 1, length, timing, peak_bytes=peak + inputs)
