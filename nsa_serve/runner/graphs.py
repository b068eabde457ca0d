"""CUDA graphs of pure-decode steps by padded batch size and context, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..models.step import StepInputs
from .inputs import StepBuffers, StepShape
from .staging import Tensors

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
# The longest context that a launch must be ready for sets how many programs it has and what each
# may have to rank: in a graph for a million tokens the top n of 256 contexts of 1k took 37 µs a
# layer on an H200. So graphs reach this far, four times as far, and so on.
_SHORTEST_REACH, _FARTHER = 2048, 4


class GraphSet:
    """Graphs of one token a row, by number of rows and reach. They share one memory pool.

    A graph reads the staging buffer, the block table and the last tokens at their fixed addresses,
    with as many columns of the table as its reach has pages, so that it serves any shorter context.
    """

    def __init__(self, forward: Callable[[StepInputs], torch.Tensor], buffers: StepBuffers) -> None:
        self._forward = forward
        self._buffers = buffers
        self.sizes = padded_sizes(buffers.max_rows)
        self.reaches = reaches(buffers.max_model_len)
        # Steps without a page in host memory have graphs of their own, without the tier's kernels.
        self._captured: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # torch's handle of the shared pool
        self._logits: torch.Tensor | None = None  # [largest size, V], where all graphs leave them

    def size_for(self, num_rows: int) -> int | None:
        """The padded number of rows; None where the batch is too large for a graph."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def run(self, fields: Tensors, shape: StepShape) -> torch.Tensor:
        """Logits [b, V] of a staged step of b padded rows; valid until the next run."""
        reach = next(reach for reach in self.reaches if reach >= shape.max_context_len)
        rows = shape.sizes.rows
        key = rows, reach, shape.spilled
        graph = self._captured.get(key)
        if graph is None:
            graph = self._captured[key] = self._capture(fields, shape, reach)
        graph.replay()
        assert self._logits is not None
        return self._logits[:rows]

    def _capture(self, fields: Tensors, shape: StepShape, reach: int) -> torch.cuda.CUDAGraph:
        # Tokens may come from the host in this step and from the device in a later one.
        shape = replace(shape, from_device=True, max_query_len=1)
        self._warm_up(fields, shape, reach)
        assert self._logits is not None
        graph = torch.cuda.CUDAGraph()
        # No tensor of the capture outlives it, so that the next one takes the same memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(self._buffers.inputs(fields, shape, reach=reach))
            self._logits[: len(logits)].copy_(logits)
        self._pool = graph.pool()
        return graph

    def _warm_up(self, fields: Tensors, shape: StepShape, reach: int) -> None:
        """Compile and autotune outside the capture; the step is run anew, with the same bytes."""
        current = torch.cuda.current_stream()
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            logits = self._forward(self._buffers.inputs(fields, shape, reach=reach))
        current.wait_stream(side)
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])


def padded_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: the table's, and ``max_rows`` where it lies between two."""
    sizes = [size for size in GRAPH_SIZES if size <= max_rows]
    if sizes[-1] < max_rows < GRAPH_SIZES[-1]:
        sizes.append(max_rows)
    return tuple(sizes)


def reaches(max_model_len: int) -> tuple[int, ...]:
    """Longest contexts of one batch size's graphs, ascending; the last is ``max_model_len``."""
    found = []
    reach = _SHORTEST_REACH
    while 2 * reach <= max_model_len:  # a graph for little more would be captured for nothing
        found.append(reach)
        reach *= _FARTHER
    return (*found, max_model_len)
