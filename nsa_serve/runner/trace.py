"""What NSA looked at: selections and gates of sampled tokens, for requests that asked to see them.

A traced step runs outside CUDA graphs, where each layer hands over its selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..kernels.reference.uniform import uniform_sigmoid
from ..request import TokenTrace
from ..schedule.plan import RowStart, ScheduledChunk
from .staging import to_device, to_host

# Of one request's record, give or take a token: its later tokens run as if nobody had asked.
MAX_TRACE_BYTES = 1 << 20


class StepTrace:
    """The record of one step: its layers call ``observe`` in order, then ``close`` ends it."""

    def __init__(self, positions: Mapping[str, int], index: torch.Tensor) -> None:
        """``positions`` by request id; ``index`` [R] int64 is where those tokens stand in the
        step."""
        self.positions = positions
        self._index = index
        self._selections: list[torch.Tensor] = []
        self._gates: list[torch.Tensor] = []
        self._selection: torch.Tensor | None = None  # [R, L, Hkv, n] int32
        self._gate: torch.Tensor | None = None  # [R, L, Hkv, 3] fp32

    def observe(
        self, layer: int, selection: torch.Tensor, gate_logits: torch.Tensor | None
    ) -> None:
        """Take down a layer's ``selection`` [T, Hkv, n] and ``gate_logits`` [T, Hq, 3]."""
        assert layer == len(self._selections), f"layer {layer} is out of order"
        self._selections.append(selection[self._index])
        if gate_logits is not None:
            gates = uniform_sigmoid(gate_logits[self._index].float())
            by_group = gates.unflatten(1, (selection.shape[1], -1))  # type: ignore[no-untyped-call]
            self._gates.append(by_group.mean(2))

    def close(self) -> None:
        """Send the record to the host; on CUDA the copy is queued."""
        if self._selections:
            self._selection = to_host(torch.stack(self._selections, 1))
        if self._gates:
            self._gate = to_host(torch.stack(self._gates, 1))

    @property
    def bytes_per_token(self) -> int:
        """Of the record; 0 for a model that selects nothing."""
        parts = [part[0].nbytes for part in (self._selection, self._gate) if part is not None]
        return sum(parts)

    def tokens(self) -> dict[str, TokenTrace]:
        """By request id, once the copies have arrived."""
        selection = self._selection
        if selection is None:
            return {}
        shape = (selection.shape[1], selection.shape[2], selection.shape[3])
        return {
            request_id: TokenTrace(
                position,
                shape,
                selection[at].numpy().tobytes(),
                None if self._gate is None else self._gate[at].numpy().tobytes(),
            )
            for at, (request_id, position) in enumerate(self.positions.items())
        }


class TraceRows:
    """Rows whose requests want a record, and how much of it each has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._num_tokens: dict[int, int] = {}  # recorded, by row
        self._bytes_per_token = 0  # unknown before the first record

    def start(self, start: RowStart) -> None:
        """A request takes a row. What it sampled before it was preempted is recorded already."""
        self.free(start.row)
        if start.sampling.trace:
            self._num_tokens[start.row] = len(start.output_token_ids)

    def free(self, row: int) -> None:
        self._num_tokens.pop(row, None)

    def begin(self, chunks: Sequence[ScheduledChunk]) -> StepTrace | None:
        """A record of those chunks' last tokens that sample and have room left; None for none."""
        if not self._num_tokens:
            return None
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        wanted = [at for at, chunk in enumerate(chunks) if chunk.samples and self._has_room(chunk)]
        if not wanted:
            return None
        for at in wanted:
            self._num_tokens[chunks[at].row] += 1
        positions = {
            chunks[at].request_id: chunks[at].start + chunks[at].num_tokens - 1 for at in wanted
        }
        return StepTrace(positions, to_device(ends[wanted].astype(np.int64) - 1, self.device))

    def end(self, trace: StepTrace) -> None:
        """A step is recorded: its size tells how many more tokens there is room for."""
        trace.close()
        self._bytes_per_token = trace.bytes_per_token

    def _has_room(self, chunk: ScheduledChunk) -> bool:
        recorded = self._num_tokens.get(chunk.row)
        return recorded is not None and recorded * self._bytes_per_token < MAX_TRACE_BYTES
