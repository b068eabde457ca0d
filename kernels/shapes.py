"""The records that travel into ops: NSA's numbers, paged caches and the ragged batch of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import torch

from .contracts import check

Tensor = torch.Tensor
Found = TypeVar("Found")

# Tokens of a row in a decode step: one, or more under speculation.
MAX_DECODE_QUERIES = 8


@dataclass(frozen=True, slots=True)
class NSAShape:
    """The sizes of NSA's branches (arXiv 2502.11089, section 3.3), in tokens or blocks."""

    compress_len: int = 32  # l
    compress_stride: int = 16  # d
    page: int = 64  # P
    num_selected: int = 16  # n, forced blocks included
    num_initial: int = 1
    num_local: int = 2
    window: int = 512  # w

    def __post_init__(self) -> None:
        l, d, page = self.compress_len, self.compress_stride, self.page  # noqa: E741
        check(
            l > 0 and d > 0 and page > 0 and self.window > 0, "NSA sizes must be positive", nsa=self
        )
        check(l % d == 0, "the compression length must be a multiple of its stride", l=l, d=d)
        check(page % d == 0, "the page must be a multiple of the compression stride", P=page, d=d)
        check(l <= page, "the compression length must not exceed the page", l=l, P=page)
        check(
            self.num_initial >= 0 and self.num_local >= 1,
            "the current block is always local",
            nsa=self,
        )
        forced = self.num_initial + self.num_local
        check(self.num_selected >= forced, "fewer selected than forced blocks", n=self.num_selected)

    @property
    def entries_per_page(self) -> int:
        """Compressed entries that belong to a full page: P / d."""
        return self.page // self.compress_stride

    @property
    def overlap(self) -> int:
        """Strides that one compressed entry spans: l / d."""
        return self.compress_len // self.compress_stride

    @property
    def dense_len(self) -> int:
        """Contexts up to this length select every block: n · P."""
        return self.num_selected * self.page

    def num_visible(self, position: int) -> int:
        """Compressed entries that the query at ``position`` sees: those that have ended."""
        if position + 1 < self.compress_len:
            return 0
        return (position + 1 - self.compress_len) // self.compress_stride + 1

    def entry_slot(self, entry: int) -> tuple[int, int]:
        """(page, slot in it) of a compressed entry: it belongs to its last token's page."""
        page = (entry * self.compress_stride + self.compress_len - 1) // self.page
        return page, entry + self.overlap - 1 - page * self.entries_per_page


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's raw keys and values, by device slot. Strides are free; the last one is 1.

    Where ``host`` is set, slot S + i is its page i, read in place by the selected branch: memory of
    the host that the device can address, strided as the device's. All else is on the device.
    """

    k: Tensor  # [S, Hkv, P, Dk]
    v: Tensor  # [S, Hkv, P, Dv]
    host: PagedKV | None = None

    def __post_init__(self) -> None:
        check(self.k.ndim == 4 and self.v.ndim == 4, "paged K/V have four axes", k=self.k, v=self.v)
        check(self.k.shape[:3] == self.v.shape[:3], "k and v differ in pages", k=self.k, v=self.v)
        if self.host is not None:
            strides = (self.k.stride(), self.v.stride())
            alike = (self.host.k.stride(), self.host.v.stride()) == strides
            check(alike, "host pages are strided otherwise", k=self.k, host=self.host.k)


def as_pages(x: Tensor, size: int) -> Tensor:
    """The view [T/size, H, size, D] of ``x`` [T, H, D]: what kernels take as a pool of pages."""
    check(x.ndim == 3 and x.shape[0] % size == 0, f"not [T, H, D] in runs of {size}", x=x)
    return torch.unflatten(x, 0, (-1, size)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class HotBlocks:
    """One layer's pieces of host pages that are kept on the device, for each KV head its own.

    Hot slot i is slot ``first_slot`` + i of the layer's ``PagedKV``: a page slot whose heads hold
    pieces of different blocks. A step's launches share ``victims`` … ``counts``.
    """

    first_slot: int
    owners: Tensor  # [Hkv, H] int32, block whose piece is in each hot slot; −1 for none
    places: Tensor  # [Hkv, N] int32, hot slot of each block; −1 for none
    last_used: Tensor  # [Hkv, H] int32, step of the last use; ``NEVER`` before the first
    early: Tensor  # [Hkv, H] int32, 1 where the piece was prefetched and not looked up since
    order: Tensor  # [Hkv, H] int32, hot slots by last use before this step, oldest first
    clock: Tensor  # [1] int32, number of this step
    claims: Tensor  # [Hkv, N] int32, scratch: ``UNCLAIMED`` between launches
    victims: Tensor  # [Hkv, H] int32, scratch
    fetched: Tensor  # [Hkv, H] int32, scratch: host pages to fetch into victims
    num_fetched: Tensor  # [Hkv] int32, scratch
    # [5] int64: look-ups of host pages, hits among them, pieces fetched; pieces prefetched, and how
    # many of them were looked up while they were there
    counts: Tensor


UNCLAIMED = 2**31 - 1
NEVER = -(2**30)  # before any step


@dataclass(frozen=True, slots=True)
class CompressedKV:
    """One layer's compressed entries, by block id; entry i has slot i + l/d − 1 − p·P/d."""

    k: Tensor  # [N, Hkv, P/d, Dk]
    v: Tensor  # [N, Hkv, P/d, Dv]

    def __post_init__(self) -> None:
        check(
            self.k.ndim == 4 and self.v.ndim == 4,
            "compressed K/V have four axes",
            k=self.k,
            v=self.v,
        )
        check(self.k.shape[:3] == self.v.shape[:3], "k and v differ in entries", k=self.k, v=self.v)


class Branch(StrEnum):
    """NSA's branches, in the order of the gates."""

    COMPRESSED = "compressed"
    SELECTED = "selected"
    WINDOW = "window"


@dataclass(frozen=True, slots=True)
class BranchStats:
    """What the backward pass of a gated branch needs of each query, beside the inputs."""

    lse: Tensor  # [T, Hq], log2 of the sum of exponentials, less log2 of the gate
    delta: Tensor  # [T, Hq], d_out · the branch's output


class CompressKind(StrEnum):
    """How l tokens become one entry (φ)."""

    MEAN = "mean"
    WEIGHTED = "weighted"
    LINEAR = "linear"
    MLP = "mlp"


@dataclass(frozen=True, slots=True)
class Phi:
    """φ for keys or for values. Which tensors are set follows from ``kind``.

    ``position`` is added to the l tokens before φ, whatever its kind; None adds nothing.
    ``weighted``: ``weight`` [Hkv, l]. ``linear``: ``weight`` [Hkv, l·D, D] or, shared by the heads,
    [l·D, D]; or the mean of the tokens plus the low-rank product ``down`` [Hkv, l·D, r] · ``up``
    [Hkv, r, D]. ``mlp``: ``down`` [l·D, l·D], SiLU, ``up`` [l·D, D], shared by the heads.
    """

    kind: CompressKind = CompressKind.MEAN
    position: Tensor | None = None  # [Hkv, l, D]
    weight: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compressor:
    """φ of keys and of values, and on which side of RoPE the keys are compressed.

    With ``inv_freq`` set, φ_k applies before RoPE: cached keys are rotated back by their own
    position, compressed, and the entry is rotated at its first token's position i·d. Rotating the
    rounded cache back, and not keeping raw keys beside it, makes an entry a pure function of
    cached bytes, so that chunking, prefix hits and rollback need no further state; the error is
    that of one rounding to the cache type.
    """

    k: Phi = Phi()
    v: Phi = Phi()
    inv_freq: Tensor | None = None  # [Dr/2] fp32; rotates the first Dr dimensions, halves paired
    rope_scale: float = 1.0  # the factor on cos and sin of yarn and longrope


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The ragged batch of a step: prefill chunks and decodes mixed, tokens of a row adjacent.

    A row with ``context_lens`` 0 and a token with position −1 are padding (CUDA graphs run at fixed
    sizes): nothing is written for them, their outputs are 0 and their selections −1.
    The ``max_*`` numbers are host-side bounds, so that no op reads a tensor back.
    """

    positions: Tensor  # [T] int64, of each token in its request; −1 for padding
    token_rows: Tensor  # [T] int32, row of each token; 0 for padding
    cu_seqlens_q: Tensor  # [B+1] int32, first token of each row
    context_lens: Tensor  # [B] int32, tokens of the request in the cache once this step is written
    block_table: Tensor  # [B, M] int32, block ids in order; −1 beyond the request's pages
    slot_table: Tensor  # [B, M] int32, device slots of those blocks; −1 where not on the device
    max_query_len: int  # the most tokens of one row; 1 in a pure decode step
    max_context_len: int  # the longest context of a row
    # (tokens, context) of each row, where the host knows them for good: not in a captured step
    row_lens: tuple[tuple[int, int], ...] | None = None
    # Every token by the same kernels, whatever else is in the step: its bytes then depend on its
    # request alone. Rows of few tokens are slower for it.
    uniform: bool = False
    # What ``once`` has found; it goes with the step.
    found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """``find()``, or what it gave before under ``key``: what all layers of a step share.

        ``find`` may read the batch's own tensors and what ``key`` holds, nothing else.
        """
        if key not in self.found:
            self.found[key] = find()
        known: Found = self.found[key]
        return known

    @property
    def is_short(self) -> bool:
        """Whether the step is for kernels that split contexts: each row has few tokens."""
        return self.max_query_len <= MAX_DECODE_QUERIES and not self.uniform

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])

    @property
    def num_rows(self) -> int:
        return int(self.context_lens.shape[0])


def check_ranked(ranked: Tensor, num_kv_heads: int, batch: StepBatch, nsa: NSAShape) -> None:
    """Raise ``ContractError`` unless ``ranked`` has room for as many blocks as a selection."""
    check(batch.is_short, "blocks are ranked in short steps alone", queries=batch.max_query_len)
    shape = (batch.num_tokens, num_kv_heads, ranked.shape[-1])
    check(ranked.shape == shape and ranked.is_contiguous(), "not [T, Hkv, m]", ranked=ranked)
    check(ranked.dtype == torch.int32, "blocks are int32", ranked=ranked)
    check(ranked.shape[-1] >= nsa.num_selected, "room for fewer than n blocks", ranked=ranked)


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Per-row sampling settings. Rows are the rows of the logits [B, V]."""

    temperature: Tensor  # [B] fp32; 0 is greedy
    top_k: Tensor  # [B] int32; 0 keeps all
    top_p: Tensor  # [B] fp32; 1 keeps all
    min_p: Tensor  # [B] fp32; 0 keeps all
    seeds: Tensor  # [B] int64
    steps: Tensor  # [B] int64, position of the token to sample: noise is f(seed, step, id)
    all_greedy: bool  # host-side: no row samples, skip the noise
    any_truncation: bool  # host-side: some row has top_k, top_p or min_p
