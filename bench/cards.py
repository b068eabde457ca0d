"""Cards by name, as far as a plan needs to know them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import GIB
from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Card:
    """A device's memory.

    ``memory``: bytes, free before anything is loaded. ``bandwidth``: bytes/s; None: not known.
    """

    name: str
    memory: int
    bandwidth: float | None = None


# Name -> (whole GiB that torch finds there, GB/s of NVIDIA's data sheet). What torch finds is the
# data sheet's memory less what the driver keeps, and on GDDR6 less the sixteenth that ECC takes.
_KNOWN = {
    "B200": (178, 8000),
    "H200": (139, 4800),
    "H100-80GB": (79, 3350),  # SXM
    "H100-NVL": (93, 3900),
    "H100-PCIe": (79, 2000),
    "A100-80GB": (79, 2039),  # SXM
    "A100-40GB": (39, 1555),
    "L40S": (44, 864),
    "L4": (22, 300),
    "A10": (22, 600),
    "RTX-6000-Ada": (47, 960),
    "RTX-A6000": (47, 768),
    "RTX-5090": (31, 1792),
    "RTX-4090": (23, 1008),
    "RTX-3090": (23, 936),
}
CARDS = tuple(Card(name, gib * GIB, rate * 1e9) for name, (gib, rate) in _KNOWN.items())


def card_named(name: str) -> Card:
    """The card of that name, however it is spelt: ``rtx 4090``, ``NVIDIA L40S``, ``4090``.

    Raises ``ConfigError`` with the names that there are, or that could be meant.
    """
    asked = _spelling(name)
    same = [card for card in CARDS if _spelling(card.name) == asked]
    found = same or [card for card in CARDS if asked and asked in _spelling(card.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(card.name for card in found or CARDS)
    if found:
        raise ConfigError(f"--card {name} may be one of {names}")
    raise ConfigError(f"--card {name:.40} is not one of {names}; give its memory, --memory 80GiB")


def _spelling(name: str) -> str:
    return re.sub("nvidia|geforce|[^a-z0-9]", "", name.lower())
