"""A decoder-only transformer of the Llama kind, from its weights and the ops of its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType

import torch
from torch.nn import functional as F

from ..kernels.dispatch import ops_for
from ..kernels.shapes import Compressor, Phi
from .attention_dense import DenseAttention
from .attention_nsa import NSAAttention
from .config import ModelConfig, PhiConfig
from .families.placement import fused_rows
from .four_bit import FourBitWeight
from .freed_memory import keep_freed_memory
from .linear import Linear, activation_dtype, build_linear
from .product_cache import bound_product_caches
from .rope import Rotary, build_rotary
from .step import StepInputs
from .weight_stream import WeightStream

Tensor = torch.Tensor


class DecoderLayer:
    """One layer's weights, and its pass from normalised input to the MLP's output."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: dict[str, Tensor],
        rotary: Rotary,
        *,
        four_bit: Mapping[str, FourBitWeight],
        deterministic: bool,
    ) -> None:
        def take(name: str) -> Tensor | None:
            # Popped, so that a weight whose packed copy is made doesn't stay beside it.
            return weights.pop(f"layers.{layer}.{name}", None)

        def need(name: str) -> Tensor:
            return weights.pop(f"layers.{layer}.{name}")

        def linear(name: str) -> Callable[[Tensor], Tensor]:
            return build_linear(
                need(f"{name}.weight"),
                take(f"{name}.bias"),
                four_bit=four_bit.get(f"layers.{layer}.{name}.weight"),
                deterministic=deterministic,
            )

        self.config = config
        self.input_norm, self.post_norm = need("input_norm"), need("post_norm")
        self.q_norm, self.k_norm = take("q_norm"), take("k_norm")
        self.ops = ops_for(self.input_norm.device)
        self.attention = build_attention(config, layer, weights, rotary, self.ops)
        self.qkv, self.o = linear("qkv"), linear("o")
        self.gate_up, self.down = linear("gate_up"), linear("down")
        self.rows = fused_rows(config)

    def __call__(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, step: StepInputs
    ) -> tuple[Tensor, Tensor]:
        """x [T, H], normalised, and the residual stream [T, H] → (MLP output, residual)."""
        config, ops = self.config, self.ops
        fused = self.qkv(x)
        q, k, v = ops.qkv_norm_rope(
            fused[:, : self.rows.qkv],
            cos,
            sin,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim_k=config.head_dim_k,
            head_dim_v=config.head_dim_v,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=config.rms_norm_eps,
        )
        attended = self.attention(q, k, v, self._gate_logits(fused), step)
        x, residual = ops.add_rms_norm(
            self.o(attended.flatten(1)), residual, self.post_norm, eps=config.rms_norm_eps
        )
        return self.down(self._activated(x, step)), residual

    def _activated(self, x: Tensor, step: StepInputs) -> Tensor:
        """silu(gate) · up [T, I] of x [T, H]."""
        gate_up = self.gate_up
        if type(gate_up) is Linear and gate_up.bias is None:
            out: Tensor = self.ops.swiglu_product(x, gate_up.weight)
        else:
            out = self.ops.swiglu(gate_up(x), uniform=step.batch.uniform)
        return out

    def _gate_logits(self, fused: Tensor) -> Tensor | None:
        """[T, Hq, 3], in the order compressed, selected, window; None without learned gates."""
        rows = self.rows
        if not rows.gate:
            return None
        gates = fused[:, rows.qkv : rows.qkv + rows.gate]
        return gates.view(fused.shape[0], self.config.num_q_heads, 3)


class Decoder:
    """The model on one device; a step is any mix of prefill chunks and decodes.

    ``weights`` are by the names of ``families.placement`` and are used up: the caller keeps none.
    ``four_bit``, by the same names, are those that are multiplied as the file stores them.
    ``deterministic``: products in an order of sums that the other tokens of a step do not change.
    ``stream``: what copies the weights of some layers to the device, step by step.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        four_bit: Mapping[str, FourBitWeight] = MappingProxyType({}),
        deterministic: bool = False,
        stream: WeightStream | None = None,
    ) -> None:
        self.config = config
        self.stream = stream
        self.embed = weights.pop("embed")
        self.device, self.dtype = self.embed.device, self.embed.dtype
        self.deterministic = deterministic
        if self.device.type == "cpu":
            keep_freed_memory()
            bound_product_caches()
        self.norm = weights.pop("norm")
        head_name = "lm_head" if "lm_head" in weights else "embed"
        self.lm_head = build_linear(
            weights.pop("lm_head", self.embed),
            four_bit=four_bit.get(head_name),
            deterministic=deterministic,
        )
        self.rotary = build_rotary(config.rope, config.head_dim_k, config.max_position, self.device)
        self.ops = ops_for(self.device)
        self.layers = [
            DecoderLayer(
                config, layer, weights, self.rotary, four_bit=four_bit, deterministic=deterministic
            )
            for layer in range(config.num_layers)
        ]
        assert not weights, f"weights without a place: {sorted(weights)}"

    @torch.inference_mode()
    def hidden(self, step: StepInputs) -> Tensor:
        """Hidden states [T, H] after the last norm, of every token of the step."""
        ops, eps = self.ops, self.config.rms_norm_eps
        cos, sin = self.rotary(step.batch.positions)
        num_tokens = step.token_ids.shape[0]
        wide = activation_dtype(num_tokens, self.embed, deterministic=self.deterministic)
        residual = F.embedding(step.token_ids, self.embed).to(wide)
        x = ops.rms_norm(residual, self.layers[0].input_norm, eps=eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        stream = self.stream
        if stream is not None:
            stream.begin()
        for index, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            if stream is not None:
                stream.enter(index)
            x, residual = layer(x, residual, cos, sin, step)
            if stream is not None:
                stream.leave(index)
            x, residual = ops.add_rms_norm(x, residual, norm, eps=eps)
        step.finish()
        hidden: Tensor = x.to(self.dtype)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] fp32 of hidden states [R, H]."""
        return self.lm_head(hidden).float()


def build_attention(
    config: ModelConfig,
    layer: int,
    weights: dict[str, Tensor],
    rotary: Rotary,
    ops: ModuleType,
) -> DenseAttention | NSAAttention:
    """A layer's attention, with φ's tensors taken out of ``weights``."""
    nsa = config.nsa
    if nsa is None:
        return DenseAttention(layer, ops)
    phi_k = _phi(nsa.phi_k, f"layers.{layer}.phi_k", weights)
    phi_v = _phi(nsa.phi_v, f"layers.{layer}.phi_v", weights)
    inv_freq = rotary.inv_freq if nsa.before_rope else None
    compressor = Compressor(k=phi_k, v=phi_v, inv_freq=inv_freq, rope_scale=rotary.scale)
    return NSAAttention(layer, ops, nsa.shape, compressor)


def _phi(config: PhiConfig, prefix: str, weights: dict[str, Tensor]) -> Phi:
    parts = ("position", "weight", "down", "up")
    return Phi(config.kind, **{part: weights.pop(f"{prefix}.{part}", None) for part in parts})
