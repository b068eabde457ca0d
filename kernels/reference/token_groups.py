"""Attention of single tokens over their own pages, those with as many pages in one product.

A token's sums don't depend on the others of its group. They are bound by reads, and read keys and
values as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..shapes import PagedKV, StepBatch
from .paged import PagePlaces, gather_places, geometry, places_of_both, short_tokens
from .softmax_attention import weighted_values

Tensor = torch.Tensor

# Pages that one product gathers: what it gathers should stay in the CPU's cache.
_PAGES = 256
# Numbers of a type's size, whose bits are cleared a vector at a time, as no mask of floats is.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Compared and hashed as the object it is: places are remembered by group.
@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """Tokens that read equally many pages, the last of them the one they are in."""

    tokens: Tensor | None  # [g], of the step's tokens; None: all of them
    rows: Tensor  # [g, 1, 1] int64, of the tables
    current: Tensor  # [g, 1] int64, the page each is in
    num_pages: int
    bias: Tensor  # [g, 1, 1, m·P] 0, or −inf at keys that are not seen
    written: Tensor  # [g, 1, P, 1], of the last page's keys: all bits set, or none after the token

    def own(self, tensor: Tensor) -> Tensor:
        """The group's part [g, ...] of a tensor [T, ...]."""
        return tensor if self.tokens is None else tensor[self.tokens]


def token_groups(
    batch: StepBatch,
    page: int,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    most: int | None = None,
) -> Sequence[TokenGroup]:
    """The step's tokens to attend one by one, but for padding, grouped; the same for all layers.

    Each reads its whole context, or the last ``window`` tokens, or at most ``most`` pages.
    """
    key = ("token groups", page, dtype, window, most)
    return batch.once(key, lambda: tuple(_find_groups(batch, page, dtype, window, most)))


def _find_groups(
    batch: StepBatch, page: int, dtype: torch.dtype, window: int | None, most: int | None
) -> Iterator[TokenGroup]:
    tokens = short_tokens(batch)
    positions = batch.positions if tokens is None else batch.positions[tokens]
    first_keys = torch.zeros_like(positions)
    if window is not None:
        first_keys = (positions + 1 - window).clamp(min=0)
    counts = positions // page - first_keys // page + 1
    if most is not None:
        counts = counts.clamp(max=most)
    for count in sorted(set(counts.tolist()) - {0}):  # padding reads no page
        for part in (counts == count).nonzero()[:, 0].split(max(1, _PAGES // count)):
            own = part if tokens is None else tokens[part]
            yield _group(batch, own, first_keys[part], count, page, dtype)


def _group(
    batch: StepBatch, tokens: Tensor, first_keys: Tensor, count: int, page: int, dtype: torch.dtype
) -> TokenGroup:
    positions = batch.positions[tokens][:, None]
    current = positions // page
    # Selected pages before the current one are seen whole, as if they were its neighbours.
    keys = (current - count + 1) * page + torch.arange(count * page, device=tokens.device)
    hidden = (keys > positions) | (keys < first_keys[:, None])
    bias = torch.zeros(hidden.shape, dtype=dtype, device=tokens.device)
    return TokenGroup(
        tokens=None if tokens.numel() == batch.num_tokens else tokens,
        rows=batch.token_rows[tokens].long()[:, None, None],
        current=current,
        num_pages=count,
        bias=bias.masked_fill_(hidden, -torch.inf)[:, None, None],
        written=-(keys <= positions)[:, None, -page:, None].to(_BITS[dtype.itemsize]),
    )


def attend_runs(q: Tensor, kv: PagedKV, batch: StepBatch, groups: Sequence[TokenGroup]) -> Tensor:
    """Attention of the groups' tokens of ``q`` [T, Hq, Dk] over the last pages of their contexts.

    [T, Hq, Dv], 0 for every other token.
    """
    out = None
    for group in groups:
        find = partial(_run_places, group, kv, batch)
        places = batch.once(("places", group, geometry(kv)), find)
        attended = attend_group(q, kv, group, places)
        if group.tokens is None:
            return attended
        out = zeros(q, kv) if out is None else out
        out[group.tokens] = attended
    return zeros(q, kv) if out is None else out


def _run_places(group: TokenGroup, kv: PagedKV, batch: StepBatch) -> tuple[PagePlaces, PagePlaces]:
    pages = torch.arange(1 - group.num_pages, 1, device=group.current.device)
    pages = group.current[..., None] + pages  # [g, 1, m]
    return places_of_both(batch.slot_table[group.rows, pages], kv)


def attend_group(
    q: Tensor, kv: PagedKV, group: TokenGroup, places: tuple[PagePlaces, PagePlaces]
) -> Tensor:
    """Attention of a group's tokens, of ``q`` [T, Hq, Dk], over gathered pages: [g, Hq, Dv]."""
    k, v = gather_places(kv.k, places[0]), gather_places(kv.v, places[1])  # [g, Hkv, m·P, D]
    page = kv.k.shape[2]
    # A masked NaN would still be a NaN.
    k[:, :, -page:].view(group.written.dtype).bitwise_and_(group.written)
    v[:, :, -page:].view(group.written.dtype).bitwise_and_(group.written)
    queries = group.own(q).to(k.dtype)
    queries = queries.reshape(queries.shape[0], k.shape[1], -1, q.shape[2])
    out = weighted_values(queries, k, v, group.bias)
    return out.reshape(queries.shape[0], q.shape[1], -1).to(q.dtype)


def zeros(q: Tensor, kv: PagedKV) -> Tensor:
    """What tokens without keys get, for all tokens: [T, Hq, Dv]."""
    return q.new_zeros(q.shape[0], q.shape[1], kv.v.shape[3])
