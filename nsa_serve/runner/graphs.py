"""CUDA graphs of pure-decode steps, one for each padded batch size, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models.step import StepInputs
from .inputs import StepBuffers, StepShape
from .staging import Tensors

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and every tensor that its kernels hold addresses of."""

    graph: torch.cuda.CUDAGraph
    fields: Tensors
    inputs: StepInputs
    logits: torch.Tensor  # [b, V]


class GraphSet:
    """Graphs of one token a row, by number of rows. They share one memory pool.

    A graph reads the staging buffer, the block table and the last tokens at their fixed addresses,
    with all columns of the table, so that it serves any context.
    """

    def __init__(self, forward: Callable[[StepInputs], torch.Tensor], buffers: StepBuffers) -> None:
        self._forward = forward
        self._buffers = buffers
        self.sizes = padded_sizes(buffers.max_rows)
        # Steps without a page in host memory have graphs of their own, without the tier's kernels.
        self._captured: dict[tuple[int, bool], CapturedStep] = {}
        self._pool: Any = None  # torch's handle of the shared pool

    def size_for(self, num_rows: int) -> int | None:
        """The padded number of rows; None where the batch is too large for a graph."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def run(self, fields: Tensors, shape: StepShape) -> torch.Tensor:
        """Logits [b, V] of a staged step of b padded rows; valid until the next run."""
        key = shape.sizes.rows, shape.spilled
        step = self._captured.get(key)
        if step is None:
            step = self._captured[key] = self._capture(fields, shape)
        step.graph.replay()
        return step.logits

    def _capture(self, fields: Tensors, shape: StepShape) -> CapturedStep:
        # Tokens may come from the host in this step and from the device in a later one.
        shape = replace(shape, from_device=True, max_query_len=1)
        self._warm_up(fields, shape)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            inputs = self._buffers.inputs(fields, shape, whole_table=True)
            logits = self._forward(inputs)
        self._pool = graph.pool()
        return CapturedStep(graph, fields, inputs, logits)

    def _warm_up(self, fields: Tensors, shape: StepShape) -> None:
        """Compile and autotune outside the capture; the step is run anew, with the same bytes."""
        current = torch.cuda.current_stream()
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._forward(self._buffers.inputs(fields, shape, whole_table=True))
        current.wait_stream(side)


def padded_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: the table's, and ``max_rows`` where it lies between two."""
    sizes = [size for size in GRAPH_SIZES if size <= max_rows]
    if sizes[-1] < max_rows < GRAPH_SIZES[-1]:
        sizes.append(max_rows)
    return tuple(sizes)
