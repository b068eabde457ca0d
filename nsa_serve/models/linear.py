"""Matrix products: weights [out, in], and the fastest product that this device has for them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..config import DType
from ..kernels.dispatch import ops_for
from .four_bit import FourBitWeight, has_four_bit_product

Tensor = torch.Tensor

# From this many rows on, fp32 products beat bf16 ones on CPUs without AMX by more than it costs to
# widen the weights for the step.
_WIDEN_ROWS = 128
# Widened copies are temporary, but a large vocabulary's would be gigabytes.
_WIDEN_LIMIT = 1 << 26
# Up to this many rows, products of 4-bit weights are faster than of bf16 ones.
_FOUR_BIT_ROWS = 16


class Linear:
    """x [T, in] → x · weightᵀ + bias [T, out], by torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same product for bf16 on a CPU, from weights in oneDNN's own blocked order.

    Few rows are bound by reading the weights: packed, they stream at 1.5 times the speed of plain
    ones. Many rows are bound by arithmetic, where fp32 is the faster type on CPUs without AMX.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias
        self.num_out = weight.shape[0]
        self.widens = weight.numel() <= _WIDEN_LIMIT and not _has_amx()

    def __call__(self, x: Tensor) -> Tensor:
        if self.widens and x.shape[0] >= _WIDEN_ROWS:
            return self._widened(x)
        if x.shape[0] == 0:
            return x.new_empty(0, self.num_out)
        assert _linear_pointwise is not None
        product: Tensor = _linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [], "")
        return product.to(x.dtype)

    def _widened(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.packed.to_dense().float(), bias).to(x.dtype)


class FourBitLinear:
    """The same product from weights in 4-bit groups for few rows, from bf16 ones for many.

    Both are roundings of what the file stores: the one of its scales, the other of its weights.
    """

    def __init__(
        self, few: FourBitWeight, many: Linear | PackedLinear, bias: Tensor | None
    ) -> None:
        self.few = few
        self.many = many
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not 0 < x.shape[0] <= _FOUR_BIT_ROWS:
            return self.many(x)
        product = self.few.product(x)
        return product if self.bias is None else product.add_(self.bias)


class FixedLinear(Linear):
    """The same product, in an order of sums that does not depend on the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.ops = ops_for(weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self.ops.linear(x, self.weight, self.bias)
        return product


def build_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    four_bit: FourBitWeight | None = None,
    deterministic: bool = False,
) -> Linear | PackedLinear | FourBitLinear:
    """The product for ``weight`` [out, in] on the device and in the type it is in.

    ``four_bit``: the same weight as the file stores it, where ``uses_four_bit``.
    ``deterministic``: a row's bytes are the same whatever other rows there are.
    """
    if deterministic:
        return FixedLinear(weight, bias)
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    linear = PackedLinear(weight, bias) if on_cpu and has_fast_bf16() else Linear(weight, bias)
    return linear if four_bit is None else FourBitLinear(four_bit, linear, bias)


def uses_four_bit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights that a file stores in 4 bits are multiplied as such, beside bf16 ones."""
    on_cpu = device.type == "cpu" and dtype == torch.bfloat16
    return on_cpu and has_fast_bf16() and has_four_bit_product()


def activation_dtype(num_rows: int, weight: Tensor, *, deterministic: bool) -> torch.dtype:
    """The type in which a step of ``num_rows`` tokens is computed, weights being as ``weight``.

    That is theirs, but fp32 where products widen them: between products nothing is then rounded.
    """
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not on_cpu or deterministic or num_rows < _WIDEN_ROWS:
        return weight.dtype
    return torch.float32 if has_fast_bf16() and not _has_amx() else weight.dtype


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively, by oneDNN."""
    return bool(
        _linear_pointwise is not None
        and torch._C._has_mkldnn
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _find_linear_pointwise() -> torch._ops.OpOverload | None:
    # A build without oneDNN has the namespace, but not the ops.
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if all(hasattr(torch.ops.mkldnn, name) for name in names):
        return torch.ops.mkldnn._linear_pointwise.default
    return None


_linear_pointwise = _find_linear_pointwise()


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """The type of weights, activations and cache; ``auto`` is the fastest of the device.

    That is bf16, save for CPUs which would emulate it.
    """
    if dtype is DType.AUTO:
        fast = device.type != "cpu" or has_fast_bf16()
        return torch.bfloat16 if fast else torch.float32
    chosen: torch.dtype = getattr(torch, dtype.value)
    return chosen
