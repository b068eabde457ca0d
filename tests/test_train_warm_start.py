"""A run that goes on from an adapter: its weights and its record, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nsa_serve.errors import CheckpointError
from nsa_serve.models.checkpoint import Checkpoint
from nsa_serve.models.config import RopeConfig
from nsa_serve.models.loader import load_weights
from nsa_serve.train import __main__ as commands
from nsa_serve.train.adapter import Adapter, AdapterConfig, grown_config, stacked
from nsa_serve.train.loop import Run, RunPlan
from nsa_serve.train.schedule import Budget, rate
from nsa_serve.train.storage import save_adapter
from nsa_serve.train.trainer import LossWeights, Rates, Trainer
from nsa_serve.train.warm_start import towards_base, warm_start

from .adapters import digest
from .checkpoints import (
    CPU,
    TINY_LLAMA,
    TINY_NSA,
    open_model,
    random_tensors,
    write_config,
    write_gguf,
)
from .tiny_training import BASE, RANKS, VOCAB, disturb, load_tokenizer, make_source

CONFIG = {**TINY_LLAMA, "vocab_size": VOCAB, "tie_word_embeddings": True}
EARLIER = {"step": 9, "num_tokens": 512}
LAST = {"step": 4, "num_tokens": 256, "earlier": [EARLIER]}


@pytest.fixture(scope="module")
def base_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tensors = random_tensors(write_config(folder / "plain", CONFIG))
    return write_gguf(folder / "base.gguf", CONFIG, tensors)


@pytest.fixture(scope="module")
def base(base_file) -> Checkpoint:
    return open_model(base_file)[0]


@pytest.fixture(scope="module")
def source():
    return make_source(load_tokenizer(), num_tokens=256, longest=128)


def make_adapter(base_file: Path, *, seed: int = 0, theta: float = 30_000.0, **ranks: int):
    config = AdapterConfig({**RANKS, **ranks}, phi_rank=4, shape=TINY_NSA)
    model = grown_config(open_model(base_file)[1], RopeConfig(theta=theta), 2048, config)
    return Adapter.create(model, config, device=CPU, seed=seed)


def make_trainer(base_file: Path, adapter: Adapter) -> Trainer:
    checkpoint, config = open_model(base_file)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    return Trainer(
        adapter, stacked(weights, config.num_layers), config,
        dtype=torch.float32, weights=LossWeights(), rates=Rates.scaled(1e-4),
    )  # fmt: skip


@pytest.fixture
def shipped(base_file, tmp_path) -> Path:
    """The adapter of an earlier run, as its files hold it."""
    adapter = make_adapter(base_file, seed=7)
    disturb(adapter)
    save_adapter(tmp_path / "shipped", adapter, base=BASE, training=LAST)
    change(tmp_path / "shipped", base={"model": "base.gguf", "sha256": digest(base_file)})
    return tmp_path / "shipped"


def change(folder: Path, **changes: Any) -> None:
    file = folder / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    names = json.loads((folder / "adapter.json").read_text())["files"]
    return {k: v for name in names for k, v in load_file(folder / name).items()}


def refusal(base_file: Path, base: Checkpoint, folder: Path, **adapter: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        warm_start(make_adapter(base_file, **adapter), folder, base)
    return str(error.value)


def test_a_warm_start_takes_the_weights_and_the_records_of_earlier_runs(base_file, base, shipped):
    adapter = make_adapter(base_file)
    assert warm_start(adapter, shipped, base) == (EARLIER, {"step": 4, "num_tokens": 256})
    stored = tensors_of(shipped)
    assert len(stored) == 2 * len(adapter.tensors)
    for name, tensor in adapter.tensors.items():
        for layer, row in enumerate(tensor):
            assert torch.equal(row, stored[f"layers.{layer}.{name}"].float()), name


def test_an_adapter_on_the_way_to_its_base_adds_that_share_of_lora_and_keeps_gates_and_phi(
    base_file, base, shipped, tmp_path
):
    written = towards_base(make_adapter(base_file), shipped, base, tmp_path / "half", 0.5)
    assert written == sum(file.stat().st_size for file in (tmp_path / "half").iterdir())
    half, whole = make_adapter(base_file), make_adapter(base_file)
    *records, last = warm_start(half, tmp_path / "half", base)
    assert last == {"lora_share": 0.5}
    assert tuple(records) == warm_start(whole, shipped, base)
    checkpoint, config = open_model(base_file)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    dense = stacked(weights, config.num_layers)
    near, far = (adapter.merged(dense, torch.float32) for adapter in (half, whole))
    for name, tensor in far.items():
        plain = weights.get(name)
        if plain is None or "lm_head" in name:
            continue
        rows = len(plain)  # gates follow q, k and v
        torch.testing.assert_close(
            near[name][:rows], (plain + tensor[:rows]) / 2, rtol=0, atol=1e-2
        )
        assert torch.equal(near[name][rows:], tensor[rows:]), name
    for name, tensor in whole.tensors.items():
        if not name.endswith("lora_b"):
            assert torch.equal(half.tensors[name], tensor), name


def test_a_run_goes_on_from_an_adapter_late_in_the_curriculum_and_tells_of_the_runs_before(
    base_file, base, shipped, source, tmp_path
):
    adapter = make_adapter(base_file)
    earlier = warm_start(adapter, shipped, base)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    plan = RunPlan(
        out=tmp_path / "out", budget=Budget(steps=2), base=BASE, log_every=1,
        from_progress=0.5, earlier=earlier,
    )  # fmt: skip
    run = Run(make_trainer(base_file, adapter), source, plan, report=str)
    run.go()
    rows = [json.loads(x) for x in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    # Half of the curriculum has sequences of 64 tokens alone, the rest those of up to 128.
    assert all(max(row["lengths"]) > 64 for row in rows)
    assert max(source.draw(0, 0.0).seq_lens) == 64
    assert [row["rate"] for row in rows] == [round(rate(step / 2), 5) for step in (0, 1)]
    assert all(not torch.equal(before[name], t) for name, t in adapter.tensors.items())
    change(tmp_path / "out/adapter", base={"model": "x.gguf", "sha256": digest(base_file)})
    records = warm_start(make_adapter(base_file), tmp_path / "out/adapter", base)
    assert [record["step"] for record in records] == [9, 4, 2]


def test_rates_of_gates_and_phi_follow_that_of_lora():
    half = Rates.scaled(Rates().lora / 2)
    assert (half.phi, half.gate) == pytest.approx((Rates().phi / 2, Rates().gate / 2))
    assert Rates.scaled(Rates().lora) == Rates()


def test_an_adapter_of_another_base_or_model_or_of_other_ranks_is_refused(base_file, base, shipped):
    assert "makes rope RopeConfig(theta=30000.0" in refusal(base_file, base, shipped, theta=9e4)
    words = refusal(base_file, base, shipped, o=2)
    assert "lora.o is LowRank(rank=4, alpha=4.0), this run's is LowRank(rank=2" in words
    change(shipped, base={"model": "base.gguf", "sha256": "0" * 64})
    assert f"sha256 is {digest(base_file)}, not {'0' * 64}" in refusal(base_file, base, shipped)


def test_an_adapter_with_more_or_fewer_tensors_than_are_trained_is_refused(
    base_file, base, shipped
):
    file = shipped / json.loads((shipped / "adapter.json").read_text())["files"][0]
    tensors = load_file(file)
    save_file({**tensors, "layers.1.input_norm": torch.ones(48)}, file)
    words = "layers.1.input_norm is not among what a run trains"
    assert words in refusal(base_file, base, shipped)
    del tensors["layers.0.gate.bias"]
    save_file(tensors, file)
    assert "layers.0.gate.bias is missing" in refusal(base_file, base, shipped)


@pytest.mark.parametrize("training", [[], {"earlier": {}}, {"earlier": [3]}])
def test_a_record_of_training_that_is_none_is_refused(base_file, base, shipped, training):
    change(shipped, training=training)
    assert "training is no record of runs" in refusal(base_file, base, shipped)


def test_a_base_that_is_a_folder_is_refused(base_file, base, shipped, tmp_path):
    folder = tmp_path / "dense"
    write_config(folder, CONFIG)
    dense = open_model(folder, random_weights=True)[0]
    assert "the base of an adapter is one .gguf file" in refusal(base_file, dense, shipped)


def test_the_command_starts_from_an_adapter_where_it_is_told_to_at_the_rates_it_is_told(
    base_file, base, shipped, source, tmp_path, monkeypatch
):
    rates, plots = [], []

    def trainer_of(growth, device, given, *_):
        rates.append(given)
        return make_trainer(base_file, make_adapter(base_file))

    monkeypatch.setattr(commands, "_trainer", trainer_of)
    monkeypatch.setattr(commands, "open_base", lambda growth: open_model(base_file))
    monkeypatch.setattr(commands, "build_source", lambda *_: source)
    monkeypatch.setattr(commands, "plot_run", lambda *paths: plots.append(paths))
    out = tmp_path / "out"
    asked = ["run", "--corpus", "c", "--out", str(out), "--steps", "1", "--rate", "1e-4"]
    asked += ["--adapter", str(shipped), "--from-progress", "0.5"]
    done = CliRunner().invoke(commands.app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    assert "step_zero" not in done.output  # it is no new model
    assert rates == [Rates.scaled(1e-4)]
    assert len(plots) == 1
    (row,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert max(row["lengths"]) > 64
    training = json.loads((out / "adapter/adapter.json").read_text())["training"]
    assert [training["step"], *(run["step"] for run in training["earlier"])] == [1, 9, 4]
    # It can be served as it is.
    served = open_model(out / "adapter")[0].base
    assert served is not None
    assert (served.path, served.sha256) == (base_file.resolve(), digest(base_file))


def test_the_command_refuses_a_base_that_no_adapter_can_name(tmp_path, monkeypatch):
    write_config(tmp_path / "folder", CONFIG)
    dense = open_model(tmp_path / "folder", random_weights=True)
    monkeypatch.setattr(commands, "open_base", lambda growth: dense)
    monkeypatch.setattr(commands, "_trainer", lambda *_: pytest.fail("asked for a trainer"))
    asked = ["run", "--corpus", "c", "--out", str(tmp_path), "--steps", "1", "--model", "folder"]
    with pytest.raises(CheckpointError, match=r"is one \.gguf file"):
        CliRunner().invoke(commands.app, asked, catch_exceptions=False)


def test_the_command_refuses_to_start_beyond_the_end_of_the_curriculum(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_trainer", lambda *_: pytest.fail("asked for a trainer"))
    asked = ["run", "--corpus", "c", "--out", str(tmp_path), "--steps", "1"]
    assert CliRunner().invoke(commands.app, [*asked, "--from-progress", "1.0"]).exit_code == 2
