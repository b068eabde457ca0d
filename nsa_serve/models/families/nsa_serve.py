"""Our own format: Llama's keys and tensor names, and what NSA adds.

config.json: ``"model_type": "nsa_serve"``, Llama's keys, ``head_dim_v`` and ``qk_norm`` where they
differ from Llama, and ``"nsa": {...}`` as ``nsa_to_json`` writes it. Tensors of a layer:
``self_attn.gate.{weight,bias}`` and ``self_attn.compress_{k,v}.{position,weight,down,up}``.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from ...kernels.contracts import ContractError
from ...kernels.shapes import CompressKind, NSAShape
from ..config import ModelConfig, NSAConfig, PhiConfig
from .options import Options, transformer_fields
from .placement import Placement, dense_placements, fused_rows

_SHAPE_KEYS = tuple(field.name for field in fields(NSAShape))


def read(options: Options) -> ModelConfig:
    """Raises ``CheckpointError`` for impossible NSA sizes, and for branches with their own K/V."""
    bias = options.flag("attention_bias")
    given = transformer_fields(options)
    given["head_dim_v"] = options.count("head_dim_v", given["head_dim_v"])
    options.need("nsa")
    inner = Options(options.table("nsa"), f"{options.file}: nsa")
    config = ModelConfig(
        family="nsa_serve",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=options.flag("qk_norm"),
        nsa=_read_nsa(inner),
        **given,
    )
    inner.finish()
    return config


def _read_nsa(options: Options) -> NSAConfig:
    if (branch_kv := options.get("branch_kv", "shared")) != "shared":
        raise options.refusal("branch_kv", branch_kv)
    config = NSAConfig(
        shape=_read_shape(options),
        phi_k=_read_phi(options, "phi_k"),
        phi_v=_read_phi(options, "phi_v"),
        before_rope=options.flag("before_rope"),
        gated=options.flag("gated"),
        gate_bias=options.flag("gate_bias"),
    )
    if config.gate_bias and not config.gated:
        raise options.refusal("gate_bias", True, "needs gated")
    return config


def _read_shape(options: Options) -> NSAShape:
    default = NSAShape()
    sizes = {key: options.get(key, getattr(default, key)) for key in _SHAPE_KEYS}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise options.refusal(key, size, "must be a whole number")
    try:
        return NSAShape(**sizes)
    except ContractError as error:
        raise options.refusal("sizes", sizes, str(error)) from error


def _read_phi(outer: Options, key: str) -> PhiConfig:
    options = Options(outer.table(key), f"{outer.file}.{key}")
    kind = options.get("kind", "mean")
    if kind not in [known.value for known in CompressKind]:
        raise options.refusal("kind", kind)
    phi = PhiConfig(
        kind=CompressKind(kind),
        position=options.flag("position"),
        shared=options.flag("shared"),
        rank=options.count("rank") if options.get("rank") is not None else None,
    )
    options.finish()
    if phi.kind is not CompressKind.LINEAR and (phi.shared or phi.rank):
        raise options.refusal("kind", kind, "takes neither shared nor rank")
    if phi.shared and phi.rank:
        raise options.refusal("rank", phi.rank, "does not go with shared")
    return phi


def nsa_to_json(nsa: NSAConfig) -> dict[str, Any]:
    """The ``nsa`` object of config.json; ``read`` understands it."""
    table = asdict(nsa)
    return {**table.pop("shape"), **table, "branch_kv": "shared"}


def placements(config: ModelConfig) -> list[Placement]:
    """Llama's tensors, and each layer's gate and φ."""
    found = dense_placements(config)
    for layer in range(config.num_layers):
        found += _gate(config, layer) + phi_placements(config, layer)
    return found


def _gate(config: ModelConfig, layer: int) -> list[Placement]:
    if config.nsa is None or not config.nsa.gated:
        return []
    theirs, ours = f"model.layers.{layer}.self_attn.gate", f"layers.{layer}.qkv"
    rows = fused_rows(config)
    weight = Placement(
        f"{theirs}.weight", f"{ours}.weight", (rows.gate, config.hidden_size), rows.qkv
    )
    bias = Placement(f"{theirs}.bias", f"{ours}.bias", (rows.gate,), rows.qkv)
    return [weight, bias] if config.nsa.gate_bias else [weight]


def phi_placements(config: ModelConfig, layer: int) -> list[Placement]:
    """The tensors of φ_k and φ_v of one layer."""
    if config.nsa is None:
        return []
    found = []
    sides = (("k", config.nsa.phi_k, config.head_dim_k), ("v", config.nsa.phi_v, config.head_dim_v))
    for side, phi, dim in sides:
        shapes = phi_shapes(phi, config.num_kv_heads, config.nsa.shape.compress_len, dim)
        for part, shape in shapes.items():
            source = f"model.layers.{layer}.self_attn.compress_{side}.{part}"
            found.append(Placement(source, f"layers.{layer}.phi_{side}.{part}", shape))
    return found


def phi_shapes(phi: PhiConfig, heads: int, length: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of φ's tensors, by their names in ``kernels.shapes.Phi``."""
    flat = length * dim
    shapes: dict[str, tuple[int, ...]] = {"position": (heads, length, dim)} if phi.position else {}
    if phi.kind is CompressKind.WEIGHTED:
        shapes["weight"] = (heads, length)
    elif phi.kind is CompressKind.MLP:
        shapes |= {"down": (flat, flat), "up": (flat, dim)}
    elif phi.kind is CompressKind.LINEAR and phi.rank:
        shapes |= {"down": (heads, flat, phi.rank), "up": (heads, phi.rank, dim)}
    elif phi.kind is CompressKind.LINEAR:
        shapes["weight"] = (flat, dim) if phi.shared else (heads, flat, dim)
    return shapes
