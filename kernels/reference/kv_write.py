"""Writing a step's keys, values and completed compressed entries into the paged cache."""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch
from .compress import compress

Tensor = torch.Tensor


def kv_write(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    compressed: CompressedKV | None,
    batch: StepBatch,
    *,
    nsa: NSAShape,
    compressor: Compressor,
) -> None:
    """Write K/V of every token, and every compressed entry that these tokens complete.

    ``k`` [T, Hkv, Dk] and ``v`` [T, Hkv, Dv] are rounded to the cache's type into slot
    ``slot_table[row, pos // P]``. Entry i is completed by token i·d + l − 1 and goes to block
    ``block_table[row, page of that token]``. φ reads rounded tokens only, this step's and the
    cache's alike, so its bytes don't depend on the chunking. ``compressed`` None: a dense model.
    """
    check(k.shape[:2] == v.shape[:2], "k and v differ in tokens or heads", k=k, v=v)
    check(k.shape[0] == batch.num_tokens, "k has another number of tokens than the batch", k=k)
    check(kv.k.shape[2] == nsa.page, "the cache has another page size", k=kv.k, P=nsa.page)
    positions, rows = batch.positions, batch.token_rows.long()
    real = positions >= 0
    if not bool(real.all()):
        k, v, positions, rows = k[real], v[real], positions[real], rows[real]
    slots, offsets = batch.slot_table[rows, positions // nsa.page].long(), positions % nsa.page
    kv.k[slots, :, offsets] = k.to(kv.k.dtype)
    kv.v[slots, :, offsets] = v.to(kv.v.dtype)
    if compressed is not None:
        _write_entries(kv, compressed, batch, positions, rows, nsa, compressor)


def _write_entries(
    kv: PagedKV,
    compressed: CompressedKV,
    batch: StepBatch,
    positions: Tensor,
    rows: Tensor,
    nsa: NSAShape,
    compressor: Compressor,
) -> None:
    first = positions + 1 - nsa.compress_len
    completes = (first >= 0) & (first % nsa.compress_stride == 0)
    which = completes.nonzero()[:, 0]
    if which.numel() == 0:
        return
    first, rows = first[which], rows[which]
    tokens = first[:, None] + torch.arange(nsa.compress_len, device=first.device)  # [E, l]
    pages, offsets = tokens // nsa.page, tokens % nsa.page
    slots = batch.slot_table[rows[:, None], pages].long()
    entry_k, entry_v = compress(
        kv.k[slots, :, offsets].transpose(1, 2),
        kv.v[slots, :, offsets].transpose(1, 2),
        first_positions=first,
        compressor=compressor,
    )
    page = pages[:, -1]
    entry = first // nsa.compress_stride
    within = entry + nsa.overlap - 1 - page * nsa.entries_per_page
    blocks = batch.block_table[rows, page].long()
    compressed.k[blocks, :, within] = entry_k.to(compressed.k.dtype)
    compressed.v[blocks, :, within] = entry_v.to(compressed.v.dtype)
