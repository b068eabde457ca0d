"""The reference on the device: torch's own ops."""

from __future__ import annotations

from ..reference.dense_attention import dense_attention

__all__ = ["dense_attention"]
