"""φ on gathered tokens. It is a handful of matrix products, which torch runs well on any device."""

from __future__ import annotations

from ..reference.compress import compress

__all__ = ["compress"]
