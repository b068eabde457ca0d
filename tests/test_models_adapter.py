"""An adapter is merged into the base that it names; what is wrong with it is told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_serve import config as settings
from nsa_serve.config import EMBEDDED_MODEL, NSA_MODEL, AttentionMode, ModelSource, default_model
from nsa_serve.errors import CheckpointError, ConfigError
from nsa_serve.kernels.shapes import CompressKind
from nsa_serve.llm import LLM
from nsa_serve.models.checkpoint import EMBEDDED_SHA256, AdapterBase, resolve
from nsa_serve.models.config import NSAConfig, PhiConfig, RopeConfig, with_attention
from nsa_serve.models.families.nsa_serve import nsa_to_json
from nsa_serve.models.linear import FourBitLinear, uses_four_bit
from nsa_serve.models.loader import load_decoder, load_four_bit, load_weights
from nsa_serve.request import SamplingParams
from nsa_serve.server.flags import EngineFlags
from nsa_serve.train.adapter import Adapter, AdapterConfig, grown_config, stacked
from nsa_serve.train.storage import save_adapter
from tests.adapters import digest, random_adapter, write_adapter
from tests.checkpoints import (
    CPU,
    TINY_LLAMA,
    TINY_NSA,
    nsa_config_json,
    open_model,
    random_tensors,
    write_checkpoint,
    write_config,
    write_gguf,
)
from tests.model_steps import PagedModel

# Rows and columns that 4-bit groups and torch's product of them take.
BASE = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96}
NSA = NSAConfig(
    TINY_NSA,
    PhiConfig(CompressKind.LINEAR, position=True, rank=3),
    PhiConfig(CompressKind.WEIGHTED),
    gated=True,
    gate_bias=True,
)
LONG = {"rope_theta": 80_000.0, "max_position_embeddings": 4096}
CONFIG = nsa_config_json(NSA, hidden_size=64, intermediate_size=96, **LONG)
LOW_RANK = {
    "qkv": {"rank": 4, "alpha": 8.0},
    "o": {"rank": 2, "alpha": 2.0},
    "gate_up": {"rank": 3, "alpha": 1.5},
    "down": {"rank": 1, "alpha": 0.5},
}
ROWS = {"q_proj": 96, "k_proj": 32, "v_proj": 32}


def base_tensors(tmp_path: Path) -> dict[str, Tensor]:
    return random_tensors(write_config(tmp_path / "plain", BASE))


def write_base(
    tmp_path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> dict[str, Any]:
    """A GGUF file, and how an adapter names it."""
    path = write_gguf(tmp_path / "base.gguf", BASE, base_tensors(tmp_path), quantised=kind)
    return {"model": "../base.gguf", "sha256": digest(path)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", write_base(tmp_path), CONFIG, LOW_RANK)


def change(folder: Path, **changes: Any) -> None:
    file = folder / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_weights(*open_model(folder), device=CPU, dtype=torch.float32)
    return str(error.value)


def merged_by_hand(tmp_path: Path, folder: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint in our own format that is the base with the adapter in it."""
    tensors, given = base_tensors(tmp_path), random_adapter(folder)
    for layer in range(BASE["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        deltas = {
            target: (part["alpha"] / part["rank"])
            * given[f"{ours}.{target}.lora_b"]
            @ given[f"{ours}.{target}.lora_a"]
            for target, part in LOW_RANK.items()
        }
        parts = deltas["qkv"].split(list(ROWS.values()))
        halves = deltas["gate_up"].chunk(2)
        added = {f"self_attn.{name}": part for name, part in zip(ROWS, parts, strict=True)}
        added |= {"mlp.gate_proj": halves[0], "mlp.up_proj": halves[1]}
        added |= {"self_attn.o_proj": deltas["o"], "mlp.down_proj": deltas["down"]}
        for name, delta in added.items():
            tensors[f"{theirs}.{name}.weight"] = tensors[f"{theirs}.{name}.weight"] + delta
        for name, tensor in given.items():
            if name.startswith((f"{ours}.gate.", f"{ours}.phi_")):
                kept = name.removeprefix(f"{ours}.").replace("phi_", "compress_")
                tensors[f"{theirs}.self_attn.{kept}"] = tensor
    return tensors


def test_merged_weights_are_those_of_the_checkpoint_that_was_merged_by_hand(
    tmp_path: Path, adapter: Path
) -> None:
    checkpoint, config = open_model(adapter)
    found = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    whole = write_checkpoint(tmp_path / "whole", CONFIG, merged_by_hand(tmp_path, adapter))
    other, same = open_model(whole)
    assert config == same
    assert (config.rope.theta, config.max_position) == (80_000.0, 4096)
    expected = load_weights(other, same, device=CPU, dtype=torch.float32)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_a_merged_model_answers_as_the_checkpoint_that_was_merged_by_hand(
    tmp_path: Path, adapter: Path
) -> None:
    whole = write_checkpoint(tmp_path / "whole", CONFIG, merged_by_hand(tmp_path, adapter))
    ids = torch.randint(0, BASE["vocab_size"], (200,)).tolist()
    logits = []
    for folder in (adapter, whole):
        checkpoint, config = open_model(folder)
        model = load_decoder(checkpoint, config, device=CPU, dtype=torch.float32)
        logits.append(PagedModel(model, [len(ids)]).prefill(ids))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once(tmp_path: Path, adapter: Path, dtype: torch.dtype) -> None:
    checkpoint, config = open_model(adapter)
    wide = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    found = load_weights(checkpoint, config, device=CPU, dtype=dtype)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wide.items())


def test_what_training_merges_and_writes_is_what_is_served(tmp_path: Path) -> None:
    write_base(tmp_path)
    checkpoint, dense = open_model(tmp_path / "base.gguf")
    parts = AdapterConfig(ranks={"qkv": 4, "down": 2}, phi_rank=3)
    grown = grown_config(dense, RopeConfig(theta=80_000.0), 4096, parts)
    adapter = Adapter.create(grown, parts, device=CPU, seed=0)
    for tensor in adapter.tensors.values():
        # As files store them.
        tensor.add_(torch.randn_like(tensor), alpha=0.1).copy_(tensor.bfloat16())
    folder = tmp_path / "adapter"
    save_adapter(folder, adapter, base=AdapterBase.of(checkpoint), training={"step": 1})
    found = load_weights(*open_model(folder), device=CPU, dtype=torch.bfloat16)
    wide = load_weights(checkpoint, dense, device=CPU, dtype=torch.float32)
    expected = adapter.merged(stacked(wide, dense.num_layers), torch.bfloat16)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_parameter_that_is_given_whole_replaces_the_bases(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    folder = write_adapter(tmp_path / "adapter", base, CONFIG, LOW_RANK)
    norm = torch.rand(64)
    tensors = {**random_adapter(folder), "layers.1.input_norm": norm}
    checkpoint, config = open_model(
        write_adapter(tmp_path / "adapter", base, CONFIG, LOW_RANK, tensors)
    )
    found = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(found["layers.1.input_norm"], norm)


@pytest.mark.skipif(
    not uses_four_bit(CPU, torch.bfloat16), reason="this CPU has no product of 4-bit weights"
)
def test_only_weights_that_the_adapter_leaves_alone_stay_in_four_bits(tmp_path: Path) -> None:
    base = write_base(tmp_path, gguf.GGMLQuantizationType.Q4_1)
    some = {"gate_up": LOW_RANK["gate_up"]}
    folder = write_adapter(tmp_path / "adapter", base, CONFIG, some)
    checkpoint, config = open_model(folder)
    assert checkpoint.base is not None
    whole = load_four_bit(checkpoint.base, open_model(tmp_path / "base.gguf")[1])
    kept = load_four_bit(checkpoint, config)
    changed = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "gate_up")}
    assert changed <= whole.keys()
    assert kept.keys() == whole.keys() - changed

    decoder = load_decoder(checkpoint, config, device=CPU, dtype=torch.bfloat16)
    layer = decoder.layers[0]
    packed = {
        n for n in ("qkv", "o", "gate_up", "down") if isinstance(getattr(layer, n), FourBitLinear)
    }
    assert packed == {"o", "down"}


def test_learned_gates_are_not_served_dense(adapter: Path) -> None:
    _, config = open_model(adapter)
    with pytest.raises(ConfigError, match="gated NSA"):
        with_attention(config, AttentionMode.DENSE)


def test_a_base_with_other_bytes_is_refused(tmp_path: Path, adapter: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "sha256 is" in refusal(adapter)


def test_an_adapter_for_another_release_of_the_embedded_model_is_refused(adapter: Path) -> None:
    change(adapter, base={"model": EMBEDDED_MODEL, "sha256": "0" * 64})
    assert f"that of {EMBEDDED_MODEL} is {EMBEDDED_SHA256}" in refusal(adapter)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("layers.1.qkv.lora_b", None, "layers.1.qkv.lora_b is missing"),
        ("layers.0.gate.bias", None, "layers.0.gate.bias is missing"),
        ("layers.1.phi_k.down", None, "layers.1.phi_k.down is missing"),
        ("layers.0.o.lora_a", torch.zeros(3, 96), "o.lora_a has shape [3, 96]"),
        ("layers.0.gate.weight", torch.zeros(6, 64), "gate.weight has shape [6, 64]"),
        ("layers.0.phi_v.weight", torch.zeros(2, 9), "phi_v.weight has shape [2, 9]"),
        ("layers.0.down.lora_a", torch.zeros(1, 96).int(), "lora_a is I32"),
        ("layers.7.o.lora_a", torch.zeros(2, 96), "layers.7.o.lora_a has no place"),
        ("layers.0.phi_v.down", torch.zeros(2), "phi_v.down has no place"),
    ],
)
def test_a_tensor_that_is_missing_or_wrong_is_named(
    tmp_path: Path, adapter: Path, name: str, tensor: Tensor | None, words: str
) -> None:
    tensors = {**random_adapter(adapter), name: tensor}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    base = json.loads((adapter / "adapter.json").read_text())["base"]
    write_adapter(adapter, base, CONFIG, LOW_RANK, kept)
    assert words in refusal(adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "format and version are"),
        ({"format": "peft"}, "format and version are"),
        ({"peft_type": "LORA"}, "peft_type is not supported"),
        ({"lora": []}, "lora is missing, or no JSON dict"),
        ({"files": None}, "files is missing"),
        ({"lora": {"qkv": {"rank": 4}}}, "lora.qkv needs rank and alpha"),
        ({"lora": {"embed": {"rank": 4, "alpha": 1}}}, "lora.embed"),
        ({"lora": {"qkv": {"rank": 0, "alpha": 1}}}, "of rank 1 or more"),
        ({"files": ["adapter.bin"]}, "only safetensors are read"),
        ({"files": ["../adapter.safetensors"]}, "not a plain file name"),
        ({"files": ["absent.safetensors"]}, "no such file"),
        ({"config": {**CONFIG, "hidden_size": 32}}, "its config makes hidden_size 32, its base's"),
        ({"config": {**CONFIG, "tie_word_embeddings": True}}, "tie_embeddings True"),
        ({"config": {**CONFIG, "unheard_of": 1}}, "unheard_of"),
        ({"config": {**CONFIG, "model_type": "mamba"}}, "adapter.json: model_type 'mamba'"),
        ({"base": {"model": "../base.gguf", "sha256": "12"}}, "64 hexadecimal digits"),
        ({"base": {"model": "../none.gguf", "sha256": "0" * 64}}, "neither a .gguf file nor"),
        ({"base": {"model": "../plain", "sha256": "0" * 64}}, "neither a .gguf file nor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_json_that_is_wrong_is_told_where(
    adapter: Path, changes: dict[str, Any], words: str
) -> None:
    change(adapter, **changes)
    assert words in refusal(adapter)


def test_a_pickle_under_another_name_is_no_safetensors_file(adapter: Path) -> None:
    (adapter / "adapter-00001-of-00002.safetensors").write_bytes(b"\x80\x04\x95" * 40)
    assert "adapter-00001-of-00002.safetensors" in refusal(adapter)


def test_a_tensor_that_two_files_hold_is_refused(adapter: Path) -> None:
    extra = {"layers.0.gate.bias": torch.zeros(18)}
    for name in ("adapter-00001-of-00002.safetensors", "adapter-00002-of-00002.safetensors"):
        save_file(extra, adapter / name)
    assert "is in another file of the adapter too" in refusal(adapter)


def embedded_adapter(folder: Path) -> Path:
    """An adapter of the embedded model that changes nothing: LoRA of 0, gates at (0, 1, 0)."""
    base = resolve(ModelSource(model=EMBEDDED_MODEL))
    nsa = NSAConfig(gated=True, gate_bias=True)
    config = {**base.config, "model_type": "nsa_serve", "nsa": nsa_to_json(nsa)}
    config["max_position_embeddings"] = 65_536
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        tensors[f"layers.{layer}.qkv.lora_a"] = torch.randn(2, 576)
        tensors[f"layers.{layer}.qkv.lora_b"] = torch.zeros(960, 2)
        tensors[f"layers.{layer}.gate.weight"] = torch.zeros(27, 576)
        tensors[f"layers.{layer}.gate.bias"] = torch.tensor([-40.0, 40.0, -40.0]).repeat(9)
    named = {"model": EMBEDDED_MODEL, "sha256": EMBEDDED_SHA256}
    return write_adapter(folder, named, config, {"qkv": {"rank": 2, "alpha": 4.0}}, tensors)


def test_the_embedded_model_is_named_as_a_base_by_whatever_path_it_is_given() -> None:
    base = resolve(ModelSource(model=EMBEDDED_MODEL))
    named = AdapterBase(EMBEDDED_MODEL, EMBEDDED_SHA256)
    assert AdapterBase.of(base) == named
    assert AdapterBase.of(resolve(ModelSource(model=str(base.path)))) == named


def test_an_adapter_in_the_package_is_served_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_NSA_FOLDER", tmp_path / "none")
    assert default_model() == EMBEDDED_MODEL
    with pytest.raises(CheckpointError, match="not in this package"):
        resolve(ModelSource(model=NSA_MODEL))

    monkeypatch.setattr(settings, "_NSA_FOLDER", embedded_adapter(tmp_path / "nsa"))
    assert EngineFlags().engine_config().source.model == NSA_MODEL
    assert EngineFlags(positional="other").engine_config().source.model == "other"
    llm = LLM(default_model(), device="cpu", kv_cache_memory_bytes=32 << 20, max_model_len=1024)
    known = llm.description
    assert (known.model_name, known.attention, known.trained_sparse) == (NSA_MODEL, "nsa", True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=12))
    assert answer.text == "The capital of France is Paris."
    assert resolve(ModelSource(model=NSA_MODEL)).config["max_position_embeddings"] == 65_536
