"""What is trained: LoRA on the products, the gates and φ, over weights that stay as they are.

``merged`` makes the serving parameters of it in every step, so that training and serving compute
with the same numbers. Tensors are stacked over layers: one product per kind merges all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from ..kernels.shapes import CompressKind, NSAShape, Phi
from ..models.config import ModelConfig, NSAConfig, PhiConfig, RopeConfig
from ..models.families.placement import fused_rows

Tensor = torch.Tensor

# Logits of the gates before training: almost the selected branch alone, and still able to learn.
GATE_BIAS = (-3.0, 3.0, -3.0)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Ranks of LoRA by fused parameter, and the rank of φ_k around the mean."""

    ranks: Mapping[str, int] = field(
        default_factory=lambda: {"qkv": 64, "o": 32, "gate_up": 16, "down": 16}
    )
    phi_rank: int = 16
    shape: NSAShape = field(default_factory=NSAShape)

    def alpha(self, name: str) -> float:
        """LoRA is scaled by alpha / rank, which is 1: the learning rate says it all."""
        return float(self.ranks[name])


def grown_config(
    base: ModelConfig, rope: RopeConfig, max_position: int, adapter: AdapterConfig
) -> ModelConfig:
    """``base``, a dense model, with NSA's three branches, learned gates and ``rope``."""
    nsa = NSAConfig(
        shape=adapter.shape,
        phi_k=PhiConfig(CompressKind.LINEAR, rank=adapter.phi_rank),
        gated=True,
        gate_bias=True,
    )
    return replace(base, family="nsa_serve", rope=rope, max_position=max_position, nsa=nsa)


class Adapter:
    """The trained tensors, fp32, by name without the layer: the first axis is the layer."""

    def __init__(
        self, model: ModelConfig, config: AdapterConfig, tensors: dict[str, Tensor]
    ) -> None:
        self.model = model
        self.config = config
        self.tensors = tensors

    @classmethod
    def create(
        cls, model: ModelConfig, config: AdapterConfig, *, device: torch.device, seed: int
    ) -> Adapter:
        """An adapter that changes nothing but the gates: LoRA's and φ's second factors are 0."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in adapter_shapes(model, config).items():
            if name.endswith(("lora_a", ".down")):
                fan_in = shape[-1] if name.endswith("lora_a") else shape[-2]
                tensor = torch.randn(shape, generator=generator) * fan_in**-0.5
            else:
                tensor = torch.zeros(shape)
            tensors[name] = tensor.to(device)
        bias = torch.tensor(GATE_BIAS).repeat(model.num_q_heads)
        tensors["gate.bias"] += bias.to(device)
        return cls(model, config, tensors)

    def require_grad(self) -> None:
        for tensor in self.tensors.values():
            tensor.requires_grad_()

    def merged(self, base: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Every parameter of the grown model, in ``dtype``, with gradients to the adapter.

        ``base``: ``stacked`` parameters of the dense model, fp32.
        """
        weights = {
            name: base[name].to(dtype) for name in ("embed", "norm", "lm_head") if name in base
        }
        for name in ("input_norm", "post_norm"):
            weights |= _by_layer(name, base[name].to(dtype))
        for name in ("qkv", "o", "gate_up", "down"):
            merged = base[f"{name}.weight"]
            if name in self.config.ranks:
                a, b = self.tensors[f"{name}.lora_a"], self.tensors[f"{name}.lora_b"]
                scale = self.config.alpha(name) / self.config.ranks[name]
                merged = torch.baddbmm(merged, b, a, alpha=scale)
            if name == "qkv":
                merged = self._with_gates(merged)
            weights |= _by_layer(f"{name}.weight", merged.to(dtype))
        rows = fused_rows(self.model)
        bias = F.pad(self.tensors["gate.bias"], (rows.qkv, rows.padding))
        weights |= _by_layer("qkv.bias", bias.to(dtype))
        for part in ("down", "up"):
            weights |= _by_layer(f"phi_k.{part}", self.tensors[f"phi_k.{part}"].to(dtype))
        return weights

    def _with_gates(self, qkv: Tensor) -> Tensor:
        """[L, q + k + v, H] → all rows of the fused projection."""
        joined = torch.cat([qkv, self.tensors["gate.weight"]], 1)
        return F.pad(joined, (0, 0, 0, fused_rows(self.model).padding))


def phis_of(weights: Mapping[str, Tensor], num_layers: int) -> list[Phi]:
    """φ_k of every layer, from merged weights."""
    return [
        Phi(
            CompressKind.LINEAR,
            down=weights[f"layers.{layer}.phi_k.down"],
            up=weights[f"layers.{layer}.phi_k.up"],
        )
        for layer in range(num_layers)
    ]


def adapter_shapes(model: ModelConfig, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every trained tensor, layers first."""
    assert model.nsa is not None
    layers, hidden, inner = model.num_layers, model.hidden_size, model.intermediate_size
    rows, heads, dim = fused_rows(model), model.num_kv_heads, model.head_dim_k
    sizes = {
        "qkv": (rows.qkv, hidden),
        "o": (hidden, model.num_q_heads * model.head_dim_v),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in config.ranks.items():
        out, in_ = sizes[name]
        shapes |= {f"{name}.lora_a": (layers, rank, in_), f"{name}.lora_b": (layers, out, rank)}
    flat, rank = model.nsa.shape.compress_len * dim, config.phi_rank
    return shapes | {
        "gate.weight": (layers, rows.gate, hidden),
        "gate.bias": (layers, rows.gate),
        "phi_k.down": (layers, heads, flat, rank),
        "phi_k.up": (layers, heads, rank, dim),
    }


def stacked(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Parameters by the names of ``families.placement`` with those of layers stacked."""
    found = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.")}
    for name in (name.split(".", 2)[2] for name in weights if name.startswith("layers.0.")):
        found[name] = torch.stack([weights[f"layers.{i}.{name}"] for i in range(num_layers)])
    return found


def _by_layer(name: str, tensors: Tensor) -> dict[str, Tensor]:
    return {f"layers.{layer}.{name}": tensor for layer, tensor in enumerate(tensors.unbind())}
