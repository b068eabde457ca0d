"""From a worker's memory to the residence of pages: sizes as the cache's own rooms name them."""

from __future__ import annotations

from ..cache.near import NearPages
from ..cache.tiers import TierSizes
from ..runner.tier_sizes import TierSize

_AHEAD = 8  # one device page in so many is free, or copied already, when a step begins


def residence_sizes(size: TierSize | None) -> TierSizes | None:
    """Slots of both tiers; None without a host tier."""
    if size is None:
        return None
    return TierSizes(
        num_device=size.num_pages,
        first_host=size.num_slots,
        num_host=size.num_host,
        slab=size.slab,
        ahead=size.num_pages // _AHEAD,
    )


def near_pages(size: TierSize | None) -> NearPages | None:
    """Which pages of a running request stay on the device; None without a host tier."""
    return None if size is None else NearPages(size.num_initial, size.num_near)
