"""Builders of small checkpoints: random weights in every format that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nsa_serve.config import ModelSource
from nsa_serve.kernels.shapes import CompressKind, NSAShape
from nsa_serve.models.checkpoint import Checkpoint, resolve
from nsa_serve.models.config import ModelConfig, NSAConfig, PhiConfig
from nsa_serve.models.families import model_config, placements
from nsa_serve.models.families.nsa_serve import nsa_to_json

CPU = torch.device("cpu")
# Small enough that every branch is sparse within a hundred tokens.
TINY_NSA = NSAShape(
    compress_len=8, compress_stride=4, page=16, num_selected=4, window=24, num_local=2
)
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHIS = {
    "mean": PhiConfig(),
    "mean with position": PhiConfig(position=True),
    "weighted": PhiConfig(CompressKind.WEIGHTED, position=True),
    "linear": PhiConfig(CompressKind.LINEAR),
    "linear shared": PhiConfig(CompressKind.LINEAR, shared=True),
    "linear low rank": PhiConfig(CompressKind.LINEAR, position=True, rank=4),
    "mlp": PhiConfig(CompressKind.MLP),
}


def open_model(path: Path, **source: Any) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint at ``path`` and what it says it is."""
    checkpoint = resolve(ModelSource(model=str(path), **source))
    return checkpoint, model_config(checkpoint)


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """config.json and model.safetensors; random tensors of all names, unless given."""
    write_config(folder, config)
    save_file(
        dict(random_tensors(folder) if tensors is None else tensors), folder / "model.safetensors"
    )
    return folder


def random_tensors(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for the config.json in ``folder``, large enough for sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    _, config = open_model(folder, random_weights=True)
    tensors = {}
    for place in placements(config):
        noise = torch.randn(place.shape, generator=generator)
        scale = 0.1 if len(place.shape) == 1 else 1.5 * place.shape[-1] ** -0.5
        tensors[place.source] = noise * scale + ("norm" in place.source)
    return tensors


def nsa_config_json(nsa: NSAConfig, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny checkpoint in our own format."""
    return {**TINY_LLAMA, "model_type": "nsa_serve", "nsa": nsa_to_json(nsa), **changes}


def gated(phi: PhiConfig, *, before_rope: bool = False, gate_bias: bool = True) -> NSAConfig:
    return NSAConfig(TINY_NSA, phi, phi, before_rope, gated=True, gate_bias=gate_bias)


def write_shards(folder: Path, config: Mapping[str, Any], count: int) -> Path:
    """A checkpoint in ``count`` shards with their index."""
    write_config(folder, config)
    tensors = random_tensors(folder)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {tensor: names[i % count] for i, tensor in enumerate(tensors)}
    for name in names:
        shard = {tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}
        save_file(shard, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_transformers(folder: Path, model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Randomise ``model``, norms and biases too, and save it as transformers does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale + ("norm" in name))
    model.save_pretrained(folder)
    return model.eval()


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    arch: str = "llama",
    quantised: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file with the tensors (safetensors names), matrices stored as ``quantised``."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        found = next((heads[part] for part in heads if part in name), None)
        if found and arch == "llama":
            tensor = pair_adjacent(tensor, config[found])
        raw = tensor.numpy().astype(np.float32)
        kind = quantised if raw.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(raw, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama-like safetensors checkpoint."""
    mapped = _name_map().get_name(name, (".weight", ".bias"))
    assert mapped is not None
    return mapped


@cache
def _name_map() -> gguf.TensorNameMap:
    # Qwen3 has Llama's tensors and the norms of q and k.
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 32)


def pair_adjacent(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: row 2j of a head is j, row 2j + 1 is j + D/2."""
    dim = tensor.shape[0] // heads
    order = [
        head * dim + j + half
        for head in range(heads)
        for j in range(dim // 2)
        for half in (0, dim // 2)
    ]
    return tensor[torch.tensor(order)]


def embedded_llama(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """transformers' model in fp32 on the embedded checkpoint's dequantised weights."""
    keys = {key: value for key, value in checkpoint.config.items() if key != "model_type"}
    config = LlamaConfig(**keys)
    with torch.device("meta"):
        names = {gguf_name(name): name for name in LlamaForCausalLM(config).state_dict()}
    state = {}
    for name in checkpoint.tensors:
        tensor = _dequantised(checkpoint, name)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if (part := name.split(".")[-2]) in heads:
            rows = pair_adjacent(torch.arange(tensor.shape[0]), checkpoint.config[heads[part]])
            tensor = tensor[rows.argsort()]
        state[names[name]] = tensor
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state).eval()


def _dequantised(checkpoint: Checkpoint, name: str) -> Tensor:
    entry = checkpoint.tensors[name]
    raw = np.fromfile(entry.file, np.uint8, entry.num_bytes, offset=entry.offset)
    kind = gguf.GGMLQuantizationType[entry.dtype]
    rows = gguf.quants.dequantize(raw.reshape(16, -1), kind)
    return torch.from_numpy(np.array(rows, np.float32)).reshape(entry.shape)
