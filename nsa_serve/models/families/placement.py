"""Where each tensor of a checkpoint goes: names and shapes of ours, rows of fused parameters.

Ours, by layer: ``qkv`` holds the rows of q, k, v and, for gated NSA, of the gate; ``gate_up``
those of both halves of the MLP. One matrix product then reads the normalised input once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig

# Rows of the gate are padded to this many, so that rows of the product stay aligned.
_GATE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Placement:
    """A checkpoint's tensor fills rows [row, row + its rows) of one parameter of ours."""

    source: str
    parameter: str
    shape: tuple[int, ...]  # of the checkpoint's tensor
    row: int = 0


@dataclass(frozen=True, slots=True)
class FusedRows:
    """Rows of the fused projection of a layer, in this order."""

    q: int
    k: int
    v: int
    gate: int  # 0 without gates
    padding: int

    @property
    def qkv(self) -> int:
        return self.q + self.k + self.v

    @property
    def total(self) -> int:
        return self.qkv + self.gate + self.padding


def fused_rows(config: ModelConfig) -> FusedRows:
    """How many rows q, k, v and the gate take in a layer's fused projection."""
    gate = 3 * config.num_q_heads if config.nsa is not None and config.nsa.gated else 0
    return FusedRows(
        q=config.num_q_heads * config.head_dim_k,
        k=config.num_kv_heads * config.head_dim_k,
        v=config.num_kv_heads * config.head_dim_v,
        gate=gate,
        padding=-gate % _GATE_ROWS,
    )


def dense_placements(config: ModelConfig) -> list[Placement]:
    """The tensors of a dense checkpoint under Llama's names, which Qwen2 and Qwen3 share."""
    hidden = config.hidden_size
    placements = [
        Placement("model.embed_tokens.weight", "embed", (config.vocab_size, hidden)),
        Placement("model.norm.weight", "norm", (hidden,)),
    ]
    if not config.tie_embeddings:
        placements.append(Placement("lm_head.weight", "lm_head", (config.vocab_size, hidden)))
    for layer in range(config.num_layers):
        placements += _attention(config, layer) + _mlp(config, layer)
    return placements


def _attention(config: ModelConfig, layer: int) -> list[Placement]:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    rows, hidden = fused_rows(config), config.hidden_size
    out = config.num_q_heads * config.head_dim_v
    starts = {"q": 0, "k": rows.q, "v": rows.q + rows.k}
    sizes = {"q": rows.q, "k": rows.k, "v": rows.v}
    placements = [
        Placement(f"{theirs}.input_layernorm.weight", f"{ours}.input_norm", (hidden,)),
        Placement(f"{theirs}.self_attn.o_proj.weight", f"{ours}.o.weight", (hidden, out)),
    ]
    for part, start in starts.items():
        source, size = f"{theirs}.self_attn.{part}_proj", sizes[part]
        placements.append(
            Placement(f"{source}.weight", f"{ours}.qkv.weight", (size, hidden), start)
        )
        if config.qkv_bias:
            placements.append(Placement(f"{source}.bias", f"{ours}.qkv.bias", (size,), start))
    if config.o_bias:
        placements.append(Placement(f"{theirs}.self_attn.o_proj.bias", f"{ours}.o.bias", (hidden,)))
    if config.qk_norm:
        placements += [
            Placement(
                f"{theirs}.self_attn.{part}_norm.weight",
                f"{ours}.{part}_norm",
                (config.head_dim_k,),
            )
            for part in ("q", "k")
        ]
    return placements


def _mlp(config: ModelConfig, layer: int) -> list[Placement]:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = f"{ours}.gate_up.weight"
    return [
        Placement(f"{theirs}.post_attention_layernorm.weight", f"{ours}.post_norm", (hidden,)),
        Placement(f"{theirs}.mlp.gate_proj.weight", gate_up, (inner, hidden)),
        Placement(f"{theirs}.mlp.up_proj.weight", gate_up, (inner, hidden), inner),
        Placement(f"{theirs}.mlp.down_proj.weight", f"{ours}.down.weight", (hidden, inner)),
    ]
