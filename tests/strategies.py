"""Random shapes for the tests of ops: head layouts, NSA sizes, ragged batches of mixed chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from nsa_serve.kernels.shapes import CompressedKV, NSAShape, PagedKV, StepBatch
from tests import oracle
from tests.paged import (
    Heads,
    Tables,
    fill_entries,
    fill_tokens,
    make_tables,
    poisoned_cache,
    step_batch,
)

HEADS = [
    Heads(num_q=2, num_kv=2, dim_k=16, dim_v=16),  # G = 1
    Heads(num_q=6, num_kv=2, dim_k=16, dim_v=8),
    Heads(num_q=4, num_kv=1, dim_k=24, dim_v=16),
    Heads(num_q=16, num_kv=1, dim_k=8, dim_v=16),
]
SHAPES = [
    NSAShape(num_selected=4, window=96),  # the paper's 32/16/64, and contexts soon sparse
    NSAShape(compress_len=16, compress_stride=16, page=16, num_selected=3, window=20),
    NSAShape(compress_len=32, compress_stride=32, page=64, num_selected=3, window=64),
    NSAShape(8, 4, 16, num_selected=5, num_initial=2, num_local=1, window=33),
    NSAShape(16, 4, 16, num_selected=4, num_initial=0, num_local=1, window=7),
]


def context_lengths(nsa: NSAShape, longest: int) -> st.SearchStrategy[int]:
    """Lengths at and beside multiples of a page, a window and a compression length, and others."""
    sizes = st.sampled_from([nsa.page, nsa.window, nsa.compress_len, nsa.compress_stride])
    edges = st.builds(
        lambda size, times, off: min(longest, max(1, size * times + off)),
        sizes,
        st.integers(1, 6),
        st.integers(-1, 1),
    )
    return st.one_of(edges, st.integers(1, longest))


@dataclass(frozen=True, slots=True)
class Ragged:
    """A step over random requests: the sequences as they are, and paged, the step's tokens too."""

    heads: Heads
    nsa: NSAShape
    chunks: list[tuple[int, int, int]]  # (request, first position, number of tokens)
    k: list[Tensor]  # [L, Hkv, Dk] of each request
    v: list[Tensor]
    entries_k: list[Tensor]  # [C, Hkv, Dk] of each request
    entries_v: list[Tensor]
    q: Tensor  # [T, Hq, Dk], padding included
    tables: Tables
    kv: PagedKV
    compressed: CompressedKV
    batch: StepBatch

    def parts(self) -> list[tuple[int, slice, list[int]]]:
        """(request, its tokens in the step, their positions) of every chunk."""
        found, token = [], 0
        for request, start, count in self.chunks:
            positions = list(range(start, start + count))
            found.append((request, slice(token, token + count), positions))
            token += count
        return found

    @property
    def num_real(self) -> int:
        return sum(count for _, _, count in self.chunks)


def make_ragged(
    heads: Heads,
    nsa: NSAShape,
    lengths: list[tuple[int, int]],
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    pad_tokens: int = 0,
    pad_rows: int = 0,
) -> Ragged:
    """A step that computes the last ``new`` of ``length`` tokens for each pair in ``lengths``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tables = make_tables([length for length, _ in lengths], nsa, seed)
    kv, compressed = poisoned_cache(tables, heads, dtype)
    k, v, entries_k, entries_v = [], [], [], []
    for row, (length, _) in enumerate(lengths):
        k.append(random(length, heads.num_kv, heads.dim_k))
        v.append(random(length, heads.num_kv, heads.dim_v))
        count = oracle.num_entries(length, l=nsa.compress_len, d=nsa.compress_stride)
        entries_k.append(random(count, heads.num_kv, heads.dim_k))
        entries_v.append(random(count, heads.num_kv, heads.dim_v))
        fill_tokens(kv, tables, row, k[row], v[row])
        fill_entries(compressed, tables, row, entries_k[row], entries_v[row])
    chunks = [(row, length - new, new) for row, (length, new) in enumerate(lengths)]
    batch = step_batch(tables, chunks, pad_tokens=pad_tokens, pad_rows=pad_rows)
    q = random(batch.num_tokens, heads.num_q, heads.dim_k)
    return Ragged(heads, nsa, chunks, k, v, entries_k, entries_v, q, tables, kv, compressed, batch)


@dataclass(frozen=True, slots=True)
class RaggedPlan:
    """What makes a ``Ragged`` step: small enough to be printed when a test fails."""

    heads: Heads
    nsa: NSAShape
    lengths: list[tuple[int, int]]
    seed: int
    pad_tokens: int
    pad_rows: int

    def build(self, dtype: torch.dtype = torch.float32) -> Ragged:
        return make_ragged(
            self.heads,
            self.nsa,
            self.lengths,
            self.seed,
            dtype=dtype,
            pad_tokens=self.pad_tokens,
            pad_rows=self.pad_rows,
        )


@st.composite
def ragged_plans(draw: st.DrawFn, longest: int = 300, most_new: int = 40) -> RaggedPlan:
    """Up to four requests, decodes and chunks of up to ``most_new`` tokens mixed, and padding."""
    nsa = draw(st.sampled_from(SHAPES))
    lengths = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(context_lengths(nsa, longest))
        new = draw(st.one_of(st.just(1), st.integers(1, min(most_new, length))))
        lengths.append((length, new))
    return RaggedPlan(
        draw(st.sampled_from(HEADS)),
        nsa,
        lengths,
        seed=draw(st.integers(0, 2**31)),
        pad_tokens=draw(st.integers(0, 3)),
        pad_rows=draw(st.integers(0, 2)),
    )
