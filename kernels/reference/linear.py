"""Matrix products whose rows do not depend on how many there are (``--deterministic``)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..contracts import check

Tensor = torch.Tensor

# A library's product has one order of sums for one shape, so every product has these many rows.
_ROWS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [T, K] · ``weight`` [N, K] transposed + ``bias`` [N], as [T, N] in ``x``'s type.

    A row's bytes are the same for every T. Raises ``ContractError`` where shapes or types differ.
    """
    check(x.ndim == 2 and weight.ndim == 2, "x and weight are matrices", x=x, weight=weight)
    fits = x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    check(fits, "x and weight differ in width or type", x=x, weight=weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    tile = x.new_zeros(_ROWS, x.shape[1])
    for first in range(0, x.shape[0], _ROWS):
        rows = x[first : first + _ROWS]
        # Copied, also where the tile is full: alignment may choose between two orders as well.
        tile[: len(rows)] = rows
        out[first : first + _ROWS] = F.linear(tile, weight, bias)[: len(rows)]
    return out
