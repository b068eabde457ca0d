"""How many compiled matrix products oneDNN keeps for a CPU."""

from __future__ import annotations

import os

# Some five products make a step, so this keeps those of a dozen numbers of rows.
_CAPACITY = 64
# One cache is oneDNN's own, the other torch's in front of it. Both are 1,024 products by default.
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_product_caches() -> None:
    """Bound oneDNN's caches, unless the environment does. Later than the first product: no effect.

    A product is compiled for its number of rows, which differs from step to step, and takes about
    0.6 MiB. A thousand of them would grow a process by more than its weights over the hours.
    """
    for variable in _VARIABLES:
        os.environ.setdefault(variable, str(_CAPACITY))
