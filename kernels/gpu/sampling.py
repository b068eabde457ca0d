"""The reference on the device: torch's own ops."""

from __future__ import annotations

from ..reference.sampling import sample

__all__ = ["sample"]
