"""From a plan's plain numbers to the tensors that a forward pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.shapes import StepBatch
from ..memory.device_pool import DevicePool
from ..memory.tier import HostTier
from ..models.step import StepInputs
from ..schedule.plan import ScheduledChunk, StepPlan
from .staging import Arrays, Staging, StepSizes, Tensors, to_device


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens of a step: ``count`` of chunk ``chunk``, from its token ``first`` on."""

    chunk: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the host knows of a step without reading a tensor."""

    sizes: StepSizes
    max_query_len: int
    max_context_len: int
    row_lens: tuple[tuple[int, int], ...]  # (tokens, context) of each row that is not padding
    from_device: bool  # some token is known to the device alone
    spilled: bool = False  # some page may lie in host memory


class StepBuffers:
    """Step tensors and the tables that last over steps: block ids and last sampled token by row.

    ``block_table`` [rows, M] int32, −1 beyond a request's pages; ``last_tokens`` [rows] int64.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        mask_words: int = 0,
        uniform: bool = False,
        tier: HostTier | None = None,
    ) -> None:
        self.pool = pool
        self.tier = tier
        self.uniform = uniform
        self.max_rows = max_rows
        self.max_model_len = max_model_len
        self.mask_words = mask_words
        self.num_columns = pool.layout.num_pages(max_model_len)
        self._num_pages = np.zeros(max_rows, np.int64)
        shape = (max_rows, self.num_columns)
        self.block_table = torch.full(shape, -1, dtype=torch.int32, device=pool.device)
        self.last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=pool.device)
        # A prompt's log-probabilities may want the logits of every token, its samples' beside.
        largest = StepSizes(
            max_tokens, max_rows, max_tokens + max_rows, max_rows, max_rows, mask_words
        )
        self.staging = Staging(largest, pool.device)

    def update_tables(self, plan: StepPlan) -> None:
        """Start rows and append new blocks, in one transfer; nothing to do in most decode steps."""
        cells: list[int] = []
        blocks: list[int] = []
        for start in plan.started:
            self._num_pages[start.row] = 0
            self._append(start.row, start.block_ids, cells, blocks)
        for chunk in plan.chunks:
            self._append(chunk.row, chunk.new_block_ids, cells, blocks)
        rows = [start.row for start in plan.started]
        if not rows and not cells:
            return
        packed = to_device(np.array(rows + cells + blocks, np.int64), self.pool.device)
        if rows:
            self.block_table.index_fill_(0, packed[: len(rows)], -1)
        if cells:
            at, values = packed[len(rows) :].chunk(2)
            self.block_table.view(-1).index_copy_(0, at, values.int())

    def _append(self, row: int, ids: list[int], cells: list[int], blocks: list[int]) -> None:
        if not ids:
            return
        held = int(self._num_pages[row])
        assert held + len(ids) <= self.num_columns, "more pages than a request may have"
        first = row * self.num_columns + held
        cells.extend(range(first, first + len(ids)))
        blocks.extend(ids)
        self._num_pages[row] = held + len(ids)

    def fill(
        self,
        host: Arrays,
        sizes: StepSizes,
        chunks: Sequence[ScheduledChunk],
        spans: list[TokenSpan],
    ) -> StepShape:
        """Write the forward pass's arrays: ``chunks``, then padding up to ``sizes``."""
        lengths = np.array([chunk.num_tokens for chunk in chunks], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        rows = np.array([chunk.row for chunk in chunks], np.int64)
        ends = np.cumsum(lengths)
        num_tokens, num_rows = int(ends[-1]), len(chunks)
        contexts = starts + lengths
        held = self._num_pages[rows] * self.pool.layout.page
        assert (contexts <= held).all(), "a chunk runs beyond its request's pages"
        ids, from_device = _token_ids(chunks)
        _pad(host["token_ids"], ids, 0)
        positions = np.arange(num_tokens) + np.repeat(starts - ends + lengths, lengths)
        _pad(host["positions"], positions, -1)
        _pad(host["token_rows"], np.repeat(np.arange(num_rows), lengths), 0)
        _pad(host["cu_seqlens_q"][1:], ends, num_tokens)
        # Each padding row has one padding token.
        host["cu_seqlens_q"][0] = 0
        host["cu_seqlens_q"][num_rows + 1 :] += np.arange(
            1, sizes.rows - num_rows + 1, dtype=np.int32
        )
        _pad(host["context_lens"], contexts, 0)
        _pad(host["table_rows"], rows, 0)
        _fill_logits_index(host["logits_index"], chunks, ends, spans)
        row_lens = tuple(zip(lengths.tolist(), contexts.tolist(), strict=True))
        return StepShape(
            sizes, int(lengths.max()), int(contexts.max()), row_lens, from_device=from_device
        )

    def inputs(self, fields: Tensors, shape: StepShape, *, reach: int | None = None) -> StepInputs:
        """The forward pass's record. ``reach``: for any contexts of up to so many tokens."""
        context = shape.max_context_len if reach is None else reach
        columns = self.pool.layout.num_pages(context)
        blocks = self.block_table[:, :columns].index_select(0, fields["table_rows"])
        token_ids = fields["token_ids"]
        if shape.from_device:
            last = self.last_tokens[(-1 - token_ids).clamp_(min=0)]
            token_ids = torch.where(token_ids < 0, last, token_ids)
        batch = StepBatch(
            positions=fields["positions"],
            token_rows=fields["token_rows"],
            cu_seqlens_q=fields["cu_seqlens_q"],
            context_lens=fields["context_lens"],
            block_table=blocks,
            slot_table=self.pool.slots_of(blocks),
            max_query_len=shape.max_query_len,
            max_context_len=context,
            row_lens=shape.row_lens if reach is None else None,
            uniform=self.uniform,
        )
        inputs = StepInputs(
            token_ids, batch, self.pool.kv, self.pool.compressed, fields["logits_index"]
        )
        return self.tier.serve(inputs) if self.tier and shape.spilled else inputs


def _token_ids(chunks: Sequence[ScheduledChunk]) -> tuple[list[int], bool]:
    """All tokens in order, −1 − row for those that the device alone knows, and whether any is."""
    ids: list[int] = []
    from_device = False
    for chunk in chunks:
        ids.extend(chunk.token_ids)
        missing = chunk.num_tokens - len(chunk.token_ids)
        if missing:
            assert missing == 1, "only a request's last token can be known to the device alone"
            ids.append(-1 - chunk.row)
            from_device = True
    return ids, from_device


def _fill_logits_index(
    index: NDArray[Any],
    chunks: Sequence[ScheduledChunk],
    ends: NDArray[Any],
    spans: list[TokenSpan],
) -> None:
    """The last token of each chunk that samples, then the spans' tokens; padding is itself."""
    last = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
    index[: len(last)] = last
    at = len(last)
    for span in spans:
        first = int(ends[span.chunk]) - chunks[span.chunk].num_tokens + span.first
        index[at : at + span.count] = np.arange(first, first + span.count)
        at += span.count
    index[at:] = np.arange(at, len(index))


def _pad(array: NDArray[Any], values: Sequence[int] | NDArray[Any], padding: int) -> None:
    array[: len(values)] = values
    array[len(values) :] = padding
