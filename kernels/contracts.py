"""Checks at the edge of an op: what is asked, in words, and what was given, in numbers."""

from __future__ import annotations

from typing import Any

import torch


class ContractError(ValueError):
    """An op was called with tensors that break its contract."""


def check(condition: bool, message: str, **given: Any) -> None:
    """Raise ``ContractError`` unless ``condition``; ``given`` is shown as ``name=shape dtype``."""
    if not condition:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in given.items())
        raise ContractError(f"{message}: {shown}" if shown else message)


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)
