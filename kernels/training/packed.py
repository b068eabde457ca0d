"""Whole sequences packed end to end, so that keys and values as projected are already pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..contracts import check
from ..shapes import NSAShape, StepBatch
from ..shapes import as_pages as as_pages

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences of whole pages, packed. Each starts at a page border of the packed tokens.

    Keys of sequence r's block j are page ``cu_seqlens[r] / P + j`` of ``as_pages(k, P)``.
    Compressed entries are one tensor [T/d, Hkv, D]: slot s covers tokens [(s + 1)·d − l, (s + 1)·d)
    of the packed batch, and the first l/d − 1 slots of each sequence are no entries.
    """

    seq_lens: tuple[int, ...]
    step: StepBatch  # every token of every sequence as one step; block ids are page numbers

    @classmethod
    def build(
        cls, seq_lens: Sequence[int], *, nsa: NSAShape, device: torch.device | str
    ) -> PackedBatch:
        """The batch of sequences of ``seq_lens`` tokens, each a multiple of P.

        Raises ``ContractError`` for none, for an empty one, and for one that is no multiple of P:
        whoever packs pads at the end, which changes no token before.
        """
        lens = tuple(int(length) for length in seq_lens)
        whole = len(lens) > 0 and all(length > 0 and length % nsa.page == 0 for length in lens)
        check(whole, "sequences must be one or more whole pages", seq_lens=lens, P=nsa.page)
        return cls(lens, _step(lens, nsa.page, torch.device(device)))

    @property
    def num_tokens(self) -> int:
        return self.step.num_tokens

    @property
    def positions(self) -> Tensor:
        """[T] int64, of each token in its sequence."""
        return self.step.positions

    @property
    def cu_seqlens(self) -> Tensor:
        """[B+1] int32, first token of each sequence."""
        return self.step.cu_seqlens_q


def _step(lens: tuple[int, ...], page: int, device: torch.device) -> StepBatch:
    counts = torch.tensor(lens)
    starts = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
    rows = torch.arange(len(lens)).repeat_interleave(counts)
    blocks = torch.arange(max(lens) // page)
    table = (starts[:-1, None] // page + blocks).masked_fill(blocks >= counts[:, None] // page, -1)
    table = table.to(device, torch.int32)
    return StepBatch(
        positions=(torch.arange(sum(lens)) - starts[rows]).to(device),
        token_rows=rows.to(device, torch.int32),
        cu_seqlens_q=starts.to(device),
        context_lens=counts.to(device, torch.int32),
        block_table=table,
        slot_table=table,
        max_query_len=max(lens),
        max_context_len=max(lens),
        row_lens=tuple((length, length) for length in lens),
    )
