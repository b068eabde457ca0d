"""Sigmoid and SiLU of a number that don't depend on where in a tensor it stands.

torch's own compute the whole vectors of a call by one implementation of exp and the numbers that
are left by another, so a number's last bit depends on how many stand beside it and on how threads
share them out. Its exp alone has one implementation, and all else here rounds exactly.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def uniform_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(−x)) of ``x`` [...], fp32 or wider, without a gradient."""
    return _divisor(x).reciprocal_()


def uniform_silu(x: Tensor) -> Tensor:
    """x · sigmoid(x) of ``x`` [...], fp32 or wider, without a gradient."""
    divisor = _divisor(x)
    return torch.div(x, divisor, out=divisor)


def _divisor(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1)
