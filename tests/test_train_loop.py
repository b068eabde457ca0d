"""Runs: the same curve after a stop, a budget that ends them, adapters and logs on the way."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nsa_serve.errors import CheckpointError, ConfigError, TrainingFailed
from nsa_serve.train.batches import BatchSource, prefetched
from nsa_serve.train.dialogues import Dialogues
from nsa_serve.train.loop import Run, RunPlan
from nsa_serve.train.plot import plot_run
from nsa_serve.train.schedule import Budget, rate
from nsa_serve.train.smoke import smoke
from nsa_serve.train.storage import SHARD_BYTES, load_checkpoint, save_adapter
from nsa_serve.train.trainer import LOSS_NAMES

from .tiny_training import BASE, disturb, load_tokenizer, make_source, make_trainer, write_base

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def source():
    return make_source(load_tokenizer(), num_tokens=256, longest=128)


def plan_of(out, **changes) -> RunPlan:
    settings = {
        "out": out, "budget": Budget(steps=STEPS), "base": BASE, "log_every": 1,
        "checkpoint": out / "checkpoint", **changes,
    }  # fmt: skip
    return RunPlan(**settings)


def curve(out) -> list[list[object]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [[row["step"], row["num_tokens"], row["rate"], row["each"]] for row in rows]


def test_a_stopped_run_goes_on_with_the_same_curve_and_ends_with_the_same_adapter(
    base, source, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Run(make_trainer(base), source, plan_of(whole), report=str).go()
    said: list[str] = []
    first = Run(make_trainer(base), source, plan_of(parts, pause_seconds=2.0), report=said.append)
    first.clock = lambda: first._began + first.step  # a step takes a second
    first.go()
    assert first.step == 2
    other = make_trainer(base, seed=9)  # what it starts from is the checkpoint's
    Run(other, source, plan_of(parts), report=said.append).go()
    assert [row[0] for row in curve(whole)] == list(range(1, STEPS + 1))
    assert curve(parts) == curve(whole)
    assert any(text.startswith("going on from step 2") for text in said)
    ours, theirs = (load_file(next((o / "adapter").glob("*.safetensors"))) for o in (whole, parts))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert plot_run(whole / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def steps_of(out) -> list[object]:
    """Losses of each step, however many of them share a row."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [one for row in rows for one in row["each"]]


def test_a_run_from_an_adapter_and_with_dialogues_that_is_killed_logs_each_step_once(
    base, source, tmp_path
):
    talks = [([7 + n] * 30, [at > 9 for at in range(30)]) for n in range(20)]
    mixed = BatchSource(
        source.writer, replace(source.plan, dialogue_share=0.5), source.nsa, 4, Dialogues.of(talks)
    )
    settings = {"log_every": 3, "from_progress": 0.6, "save_seconds": 1.5, "num_threads": 1}

    def run_to(out, *, kill_at: int | None = None) -> Run:
        trainer = make_trainer(base)
        disturb(trainer.adapter)
        run = Run(trainer, mixed, plan_of(out, **settings), report=str)
        run.clock = lambda: run._began + run.step  # a step takes a second: every second one saves
        step = trainer.step

        def killed_at(batches, factor):
            if run.step == kill_at:
                raise KeyboardInterrupt
            return step(batches, factor)

        trainer.step = killed_at
        return run

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_to(whole).go()
    with pytest.raises(KeyboardInterrupt):
        run_to(parts, kill_at=3).go()
    row = (parts / "log.jsonl").read_text().splitlines()[-1]
    with (parts / "log.jsonl").open("a") as log:
        log.write(row.replace('"step": 2', '"step": 3') + "\n" + row[:40])
    (parts / "checkpoint" / "step3-00001-of-00002.safetensors.part").write_bytes(b"half")
    run_to(parts).go()
    assert len(steps_of(whole)) == STEPS
    spoken = [one[LOSS_NAMES.index("dialogue")] is not None for one in steps_of(whole)]
    assert spoken == [True, False, True, False]
    assert steps_of(parts) == steps_of(whole)
    assert not list(parts.rglob("*.part"))


def test_a_run_by_the_clock_saves_on_the_way_and_ends_in_time(base, source, tmp_path):
    seconds = iter(range(10_000))
    run = Run(
        make_trainer(base), source,
        plan_of(tmp_path, budget=Budget(seconds=60), save_seconds=20.0, checkpoint=None),
        clock=lambda: float(next(seconds)), report=str,
    )  # fmt: skip
    run.go()
    assert run.progress == 1
    assert not (tmp_path / "checkpoint").exists()
    description = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert description["training"]["step"] == run.step > 0
    rates = [row[2] for row in curve(tmp_path)]
    assert max(rates) > rates[-1]


def test_the_learning_rate_rises_and_falls_and_a_budget_ends_by_whichever_comes_first():
    assert rate(0.0) < rate(0.02) < rate(0.04) == pytest.approx(1.0)
    assert rate(0.5) < 1
    assert rate(1.0) == pytest.approx(0.05)
    assert Budget(steps=10, seconds=100).progress(5, 10) == 0.5
    assert Budget(steps=10, seconds=100).progress(1, 90) == 0.9
    assert Budget(steps=10).progress(20, 0) == 1


def test_batches_are_the_same_for_the_same_number_and_others_for_another(source):
    one, same, other = (source.draw(i, 0.0) for i in (5, 5, 6))
    assert torch.equal(one.token_ids, same.token_ids)
    assert torch.equal(one.rows, same.rows)
    assert not torch.equal(one.token_ids, other.token_ids)
    assert sum(one.seq_lens) == 256
    assert max(source.draw(5, 0.9).seq_lens) > 64 >= max(one.seq_lens)
    assert torch.equal(one.targets, one.token_ids[one.rows + 1])


def test_prefetching_keeps_the_order_and_hands_on_what_went_wrong():
    def draw(index: int) -> int:
        if index == 7:
            raise RuntimeError("no more texts")
        return index

    before = threading.active_count()
    batches = prefetched(draw, 3)
    assert [next(batches) for _ in range(4)] == [3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="no more texts"):
        next(batches)
    assert threading.active_count() == before


def test_an_adapter_is_saved_in_files_of_at_most_16_mb(base, tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_serve.train.storage.SHARD_BYTES", 20_000)
    assert SHARD_BYTES <= 16_000_000
    trainer = make_trainer(base)
    disturb(trainer.adapter)
    save_adapter(tmp_path, trainer.adapter, base=BASE, training={"step": 3})
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert len(description["files"]) > 1
    tensors = {}
    for name in description["files"]:
        assert (tmp_path / name).stat().st_size < 25_000
        tensors |= load_file(tmp_path / name)
    assert len(tensors) == 2 * len(trainer.adapter.tensors)
    saved = tensors["layers.1.gate.bias"]
    assert torch.equal(saved, trainer.adapter.tensors["gate.bias"][1].detach())
    assert tensors["layers.0.qkv.lora_a"].dtype == torch.bfloat16


def test_a_broken_checkpoint_is_refused_by_name(base, tmp_path):
    trainer = make_trainer(base)
    assert load_checkpoint(tmp_path, trainer.adapter, trainer.optimiser) is None
    (tmp_path / "state.json").write_text('{"step": 1, "files": ["step1.safetensors"]}')
    with pytest.raises(CheckpointError, match="not a checkpoint of this adapter"):
        load_checkpoint(tmp_path, trainer.adapter, trainer.optimiser)


def test_a_trial_times_each_length_and_refuses_a_tensor_without_gradient(base, source):
    said: list[str] = []
    trainer = make_trainer(base)
    found = smoke(trainer, source, lengths=[128, 256], steps=3, report=said.append)
    assert found["timed"].keys() == {"128", "256"}
    assert all(row["tokens_per_second"] > 0 for row in found["timed"].values())
    assert len(found["curve"]) == 3
    trainer.adapter.tensors["phi_k.up"].requires_grad_(False)
    with pytest.raises(TrainingFailed, match=r"phi_k\.up gets no gradient"):
        smoke(trainer, source, lengths=[128], steps=3, report=said.append)


def test_a_log_without_rows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no rows to plot"):
        plot_run(tmp_path / "log.jsonl", tmp_path / "x.png")
