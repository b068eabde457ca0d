"""The memory that steps take beside weights and cache, measured on the heaviest step there is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory.device_pool import DevicePool
from ..memory.layout import KVLayout
from ..request import MAX_LOGPROBS, SamplingParams
from ..schedule.plan import RowStart, ScheduledChunk, StepPlan
from .model_runner import ModelRunner

# Pages of the pool that stands in for the cache; long contexts name them again and again.
_BLOCKS = 16
_HEAVY = SamplingParams(
    temperature=1.0, top_p=0.9, min_p=0.01, presence_penalty=0.1, logprobs=MAX_LOGPROBS
)


def heaviest_plan(
    *, max_rows: int, max_tokens: int, max_model_len: int, page: int, num_blocks: int
) -> StepPlan:
    """A step with every row and the whole token budget, all at the longest context, all sampling.

    One row takes the tokens that the others leave. Rows share pages, so what they write is
    garbage, and only the step's memory means anything.
    """
    num_rows = min(max_rows, max_tokens)
    pages = -(-max_model_len // page)
    blocks = [page_index % num_blocks for page_index in range(pages)]
    lengths = [min(max_tokens - num_rows + 1, max_model_len)] + [1] * (num_rows - 1)
    started = [RowStart(row, str(row), _HEAVY, row, [0], [], blocks) for row in range(num_rows)]
    chunks = [
        ScheduledChunk(row, str(row), max_model_len - count, count, [0] * count, [], True)
        for row, count in enumerate(lengths)
    ]
    return StepPlan(0, [], started, chunks)


def measure_peak(
    build_runner: Callable[[DevicePool], ModelRunner],
    layout: KVLayout,
    *,
    max_rows: int,
    max_tokens: int,
    max_model_len: int,
    device: torch.device,
) -> int:
    """Bytes beside weights and cache at the height of the heaviest step, on a CUDA device."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    pool = DevicePool(layout, _BLOCKS, _BLOCKS, device)
    runner = build_runner(pool)
    plan = heaviest_plan(
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        page=layout.page,
        num_blocks=_BLOCKS,
    )
    runner.launch(plan).result()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - pool.num_bytes
