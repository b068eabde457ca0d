"""Arrays that travel to the device once a step: filled by numpy on the host, sent in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Tensors = dict[str, torch.Tensor]

_DTYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "i64": (np.int64, torch.int64),
    "i32": (np.int32, torch.int32),
    "f32": (np.float32, torch.float32),
}
_ALIGNMENT = 16  # bytes; of every array in the buffer


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Lengths of a step's arrays."""

    tokens: int  # T, padding included
    rows: int  # B, padding included
    logits: int  # R, tokens whose logits are computed
    samples: int  # rows that sample; at most R
    masks: int = 0  # samples that a grammar restricts
    mask_words: int = 0  # of one mask: 32 bits each

    @property
    def fields(self) -> tuple[tuple[str, str, int], ...]:
        """(name, type, length) of every array. Those of the forward pass come first, so that
        their offsets, which a CUDA graph keeps, don't depend on the number of samples."""
        tokens, rows, samples = self.tokens, self.rows, self.samples
        return (
            ("token_ids", "i64", tokens),  # −1 − row: the last token sampled for that row
            ("positions", "i64", tokens),
            ("token_rows", "i32", tokens),
            ("cu_seqlens_q", "i32", rows + 1),
            ("context_lens", "i32", rows),
            ("table_rows", "i32", rows),  # row of the tables for each row of the batch
            ("logits_index", "i64", self.logits),
            ("sample_rows", "i64", samples),  # row of the tables for each sample
            ("seeds", "i64", samples),
            ("steps", "i64", samples),
            ("temperature", "f32", samples),
            ("top_p", "f32", samples),
            ("min_p", "f32", samples),
            ("top_k", "i32", samples),
            ("mask_samples", "i64", self.masks),  # position among the samples
            ("masks", "i32", self.masks * self.mask_words),
        )

    def offsets(self) -> tuple[list[tuple[str, str, int, int]], int]:
        """([name, type, first byte, bytes], bytes in all)."""
        spans, end = [], 0
        for name, kind, length in self.fields:
            size = length * np.dtype(_DTYPES[kind][0]).itemsize
            spans.append((name, kind, end, size))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return spans, end


class Staging:
    """Two host buffers in turn, so that step k + 1 is filled while step k's copy is under way.

    On CUDA the host buffers are pinned and the device's one has a fixed address; elsewhere the
    host buffer is what the step reads.
    """

    def __init__(self, largest: StepSizes, device: torch.device) -> None:
        num_bytes = largest.offsets()[1]
        self._on_cuda = device.type == "cuda"
        self._host = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._on_cuda) for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._turn = 0

    def open(self, sizes: StepSizes) -> Arrays:
        """Writable host arrays for the next step."""
        self._turn ^= 1
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()  # of two steps ago, so seldom a wait
        buffer = self._host[self._turn].numpy()
        spans = sizes.offsets()[0]
        return {n: buffer[at : at + size].view(_DTYPES[kind][0]) for n, kind, at, size in spans}

    def send(self, sizes: StepSizes) -> Tensors:
        """The arrays opened last, on the device; the copy is queued, not awaited."""
        buffer = self._host[self._turn]
        if not self._on_cuda:
            return _views(buffer, sizes)
        num_bytes = sizes.offsets()[1]
        self._device[:num_bytes].copy_(buffer[:num_bytes], non_blocking=True)
        self._sent[self._turn] = record_event()
        return _views(self._device, sizes)


def _views(buffer: torch.Tensor, sizes: StepSizes) -> Tensors:
    spans = sizes.offsets()[0]
    return {n: buffer[at : at + size].view(_DTYPES[kind][1]) for n, kind, at, size in spans}


def record_event() -> torch.cuda.Event:
    """An event behind all that is queued on the current stream."""
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on ``device``; on CUDA the copy is queued, not awaited."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the host: on CUDA the copy is queued, to be read after an event behind it."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
