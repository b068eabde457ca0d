"""Full causal attention over the paged cache.

Rows of few tokens are split over their contexts; the others go through xformers, or through query
tiles of our own. In a mixed step both run, so that a decode token's bytes do not depend on whether
somebody's prompt is in the step.
"""

from __future__ import annotations

import torch

from ..contracts import check
from ..shapes import PagedKV, StepBatch
from .dense_decode import attend_short_rows
from .dense_prefill import attend_long_rows
from .varlen_prefill import attend_varlen, find_xformers, serves

Tensor = torch.Tensor


def dense_attention(q: Tensor, kv: PagedKV, batch: StepBatch) -> Tensor:
    """Causal attention of ``q`` [T, Hq, Dk] over all cached tokens of its row: [T, Hq, Dv].

    Scores are scaled by 1/√Dk. Padding tokens get 0. Raises ``ContractError`` where shapes do not
    fit.
    """
    check(q.ndim == 3 and q.stride(2) == 1, "q must be [T, Hq, Dk] with unit last stride", q=q)
    check(q.shape[0] == batch.num_tokens, "q and the batch differ in tokens", q=q)
    check(q.shape[2] == kv.k.shape[3], "q and keys differ in Dk", q=q, k=kv.k)
    check(q.shape[1] % kv.k.shape[1] == 0, "Hq is no multiple of Hkv", q=q, k=kv.k)
    out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    if batch.uniform:
        attend_long_rows(q, kv, batch, out, shortest=1)
    elif batch.is_short:
        attend_short_rows(q, kv, batch, out, longest=batch.max_query_len)
    else:
        _attend_mixed(q, kv, batch, out)
    return out


def _attend_mixed(q: Tensor, kv: PagedKV, batch: StepBatch, out: Tensor) -> None:
    shortest = 1
    if batch.num_rows > 1:
        attend_short_rows(q, kv, batch, out, longest=1)
        shortest = 2
    varlen = find_xformers() if serves(q, kv, batch) else None
    if varlen is None:
        attend_long_rows(q, kv, batch, out, shortest=shortest)
    else:
        attend_varlen(q, kv, batch, out, varlen, shortest=shortest)
