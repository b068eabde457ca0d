"""The selection turned round: for each page and KV head, the tokens that read it, in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..shapes import NSAShape, StepBatch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class PageReaders:
    """Lists of readers, ascending, cut into chunks of at most ``chunk`` tokens.

    A page that many read (the first of a sequence is read by all of it) has many chunks.
    """

    tokens: Tensor  # [Hkv, T·n] int32, page after page; unused choices last
    starts: Tensor  # [Hkv, T/P + 1] int32, where each page's list starts in ``tokens``
    first_chunks: Tensor  # [Hkv, T/P + 1] int32, the first chunk of each page
    chunk_pages: Tensor  # [Hkv, chunks] int32, page of each chunk; T/P beyond the last
    chunk: int


def find_readers(selection: Tensor, batch: StepBatch, *, nsa: NSAShape, chunk: int) -> PageReaders:
    """Readers of every page from ``selection`` [T, Hkv, n]; sizes follow from T alone."""
    num_tokens, _, num_selected = selection.shape
    num_pages = num_tokens // nsa.page
    first_pages = batch.cu_seqlens_q[batch.token_rows.long()] // nsa.page
    pages = torch.where(selection >= 0, selection + first_pages[:, None, None], num_pages)
    # Stable, so that every list is in the order of tokens.
    ordered, places = pages.transpose(0, 1).flatten(1).sort(dim=1, stable=True)
    starts = _firsts(ordered, num_pages + 1)
    first_chunks = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + (chunk - 1)) // chunk, 1, out=first_chunks[:, 1:])
    num_chunks = num_pages + num_tokens * num_selected // chunk
    return PageReaders(
        tokens=(places // num_selected).int(),
        starts=starts,
        first_chunks=first_chunks,
        chunk_pages=_firsts(first_chunks[:, 1:].contiguous(), num_chunks, right=True),
        chunk=chunk,
    )


def _firsts(ordered: Tensor, count: int, *, right: bool = False) -> Tensor:
    """Where 0 … ``count`` − 1 would stand in each row of ``ordered``: [rows, count] int32."""
    wanted = torch.arange(count, dtype=ordered.dtype, device=ordered.device)
    wanted = wanted.expand(ordered.shape[0], -1).contiguous()
    return torch.searchsorted(ordered, wanted, right=right, out_int32=True)
