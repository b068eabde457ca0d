"""An adapter merged into its base: LoRA (arXiv 2106.09685), gates and φ on dequantised weights.

Tensors are named after our parameters (``families.placement``): ``layers.N.{qkv,o,gate_up,down}``
with ``.lora_a`` [r, in] and ``.lora_b`` [out, r], ``layers.N.gate.{weight,bias}`` and
``layers.N.phi_{k,v}.*``. Any other name is a parameter of ours that it replaces whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..errors import CheckpointError
from .checkpoint import LowRank
from .config import ModelConfig
from .families.nsa_serve import phi_shapes
from .families.placement import fused_rows

Tensor = torch.Tensor
Shape = tuple[int, ...]

# What both must have alike, or the base's weights mean nothing in the merged model.
_SHARED = (
    *("vocab_size", "hidden_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim_k"),
    *("head_dim_v", "intermediate_size", "tie_embeddings", "qkv_bias", "o_bias"),
    "qk_norm",
)


def check_base(config: ModelConfig, base: ModelConfig, file: str) -> None:
    """Raise ``CheckpointError`` where the merged model is of another shape than its base."""
    for name in _SHARED:
        ours, theirs = getattr(config, name), getattr(base, name)
        if ours != theirs:
            raise CheckpointError(f"{file}: its config makes {name} {ours}, its base's is {theirs}")


def adapter_shapes(
    config: ModelConfig,
    low_rank: Mapping[str, LowRank],
    parameters: Mapping[str, Shape],
    given: Iterable[str],
) -> dict[str, Shape]:
    """Shapes of the adapter's tensors by name: those it must have, and whole parameters it has."""
    shapes: dict[str, Shape] = {}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        for target, part in low_rank.items():
            out, width = _unfused(config, target, parameters[f"{prefix}.{target}.weight"])
            shapes[f"{prefix}.{target}.lora_a"] = (part.rank, width)
            shapes[f"{prefix}.{target}.lora_b"] = (out, part.rank)
        shapes |= _sparse_shapes(config, prefix)
    return shapes | {name: parameters[name] for name in given if name in parameters}


def _unfused(config: ModelConfig, target: str, shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a target in the base, which has no gates."""
    return fused_rows(config).qkv if target == "qkv" else shape[0], shape[1]


def _sparse_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    """Shapes of a layer's gates and φ."""
    nsa = config.nsa
    if nsa is None:
        return {}
    shapes: dict[str, Shape] = {}
    rows = fused_rows(config).gate
    if nsa.gated:
        shapes[f"{prefix}.gate.weight"] = (rows, config.hidden_size)
    if nsa.gate_bias:
        shapes[f"{prefix}.gate.bias"] = (rows,)
    for side, phi, dim in (
        ("k", nsa.phi_k, config.head_dim_k),
        ("v", nsa.phi_v, config.head_dim_v),
    ):
        parts = phi_shapes(phi, config.num_kv_heads, nsa.shape.compress_len, dim)
        shapes |= {f"{prefix}.phi_{side}.{part}": shape for part, shape in parts.items()}
    return shapes


def is_changed(parameter: str, tensors: Iterable[str]) -> bool:
    """Whether an adapter of ``tensors`` changes a parameter of the base's."""
    stem = parameter.removesuffix(".weight")
    gate = f"{stem.removesuffix('.qkv')}.gate.weight" if stem.endswith(".qkv") else ""
    return any(name in (parameter, f"{stem}.lora_a", gate) for name in tensors)


def merge(
    config: ModelConfig,
    base: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    low_rank: Mapping[str, LowRank],
    parameters: Mapping[str, Shape],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Every parameter of the merged model, computed in fp32 and rounded once to ``dtype``.

    ``base`` holds the base's parameters in fp32 and is used up; ``tensors`` are the adapter's.
    """
    device = base["embed"].device
    merged = {}
    for name, shape in parameters.items():
        weight = base.pop(name, None)
        if name in tensors:
            weight = tensors[name]
        weight = torch.zeros(shape, device=device) if weight is None else weight.float()
        weight = _with_low_rank(name, weight, tensors, low_rank)
        merged[name] = _with_gate(config, name, weight, tensors, shape).to(dtype)
    return merged


def _with_low_rank(
    name: str, weight: Tensor, tensors: Mapping[str, Tensor], low_rank: Mapping[str, LowRank]
) -> Tensor:
    """W + alpha/r · B·A, where the adapter has a pair for the parameter."""
    stem = name.removesuffix(".weight")
    down = tensors.get(f"{stem}.lora_a")
    if down is None or stem == name:
        return weight
    part = low_rank[stem.rpartition(".")[2]]
    return weight + part.scale * (tensors[f"{stem}.lora_b"].float() @ down.float())


def _with_gate(
    config: ModelConfig, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shape: Shape
) -> Tensor:
    """A layer's fused projection grown by the gate's rows; every other parameter as it is."""
    prefix, fused, kind = name.rpartition(".qkv.")
    if not fused:
        return weight
    rows = fused_rows(config)
    grown = weight.new_zeros(shape)
    grown[: rows.qkv] = weight[: rows.qkv]
    gate = tensors.get(f"{prefix}.gate.{kind}")
    if gate is not None:
        grown[rows.qkv : rows.qkv + rows.gate] = gate
    return grown
