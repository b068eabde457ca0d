"""The model in training is the served one, its gradients are right, and it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nsa_serve.config import ModelSource
from nsa_serve.kernels.shapes import CompressKind, Compressor, Phi
from nsa_serve.kernels.training.attention import compress_keys
from nsa_serve.kernels.training.packed import PackedBatch
from nsa_serve.models.adapter import merge
from nsa_serve.models.checkpoint import LowRank, resolve
from nsa_serve.models.config import RopeConfig
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.families import model_config
from nsa_serve.models.loader import parameter_shapes
from nsa_serve.models.rope import inverse_frequencies
from nsa_serve.train.adapter import Adapter, AdapterConfig, adapter_shapes, grown_config
from nsa_serve.train.grow import grown_rope
from nsa_serve.train.head_loss import head_loss
from nsa_serve.train.importance import ImportanceLoss, Probe, probe_loss
from nsa_serve.train.row_ops import RowOps
from nsa_serve.train.step_zero import step_zero
from nsa_serve.train.storage import config_json

from .checkpoints import CPU, TINY_NSA, open_model
from .model_steps import PagedModel
from .tiny_training import disturb, load_tokenizer, make_source, make_trainer, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def source():
    return make_source(load_tokenizer())


def test_training_computes_the_served_models_logits(base, source):
    trainer = make_trainer(base)
    disturb(trainer.adapter)
    batch = source.draw(0, 0.0)
    packed = PackedBatch.build(batch.seq_lens, nsa=TINY_NSA, device=CPU)
    with torch.no_grad():
        weights = trainer.merged()
        hidden = trainer.hidden(weights, batch, packed)
    decoder = Decoder(trainer.adapter.model, dict(weights))
    served = PagedModel(decoder, list(batch.seq_lens))
    pieces = batch.token_ids.split(list(batch.seq_lens))
    expected = served.step([(row, 0, ids.tolist()) for row, ids in enumerate(pieces)])
    torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=2e-4)


def test_the_teacher_is_the_dense_base_in_windows_that_it_can_read(base, source):
    trainer = make_trainer(base)
    config = open_model(base)[1]
    weights = {name: tensor.clone() for name, tensor in trainer.teacher_weights.items()}
    decoder = Decoder(config, weights)
    batch = source.draw(0, 1.0)
    assert len(batch.teacher_lens) > len(batch.seq_lens)
    served = PagedModel(decoder, list(batch.teacher_lens))
    pieces = batch.token_ids.split(list(batch.teacher_lens))
    expected = served.step([(row, 0, ids.tolist()) for row, ids in enumerate(pieces)])
    torch.testing.assert_close(trainer.taught(batch), expected, atol=2e-4, rtol=2e-4)


def test_the_teacher_is_heard_where_it_has_read_enough(source):
    batch = source.draw(0, 1.0)
    limit, past = source.plan.teacher_limit, source.plan.teacher_past
    heard, lens = [], []
    for length in batch.seq_lens:
        heard += [at < limit or at % limit >= past for at in range(length)]
        lens += [limit] * (length // limit) + ([length % limit] if length % limit else [])
    assert list(batch.teacher_lens) == lens
    assert batch.taught.tolist() == [heard[row] for row in batch.rows.tolist()]
    assert bool(batch.taught.any())
    assert not bool(batch.taught.all())


def test_merging_in_training_and_at_load_agree(base):
    trainer = make_trainer(base)
    disturb(trainer.adapter)
    model, config = trainer.adapter.model, trainer.adapter.config
    tensors = {
        f"layers.{layer}.{name}": row.detach()
        for name, stack in trainer.adapter.tensors.items()
        for layer, row in enumerate(stack)
    }
    low_rank = {name: LowRank(rank, config.alpha(name)) for name, rank in config.ranks.items()}
    loaded = merge(
        model, dict(trainer.teacher_weights), tensors, low_rank, parameter_shapes(model),
        torch.float32,
    )  # fmt: skip
    merged = trainer.merged()
    assert merged.keys() == loaded.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight.detach(), loaded[name], atol=1e-5, rtol=1e-5, msg=name)


def test_before_training_only_the_gates_differ_from_the_training_free_model(base, source):
    trainer = make_trainer(base)
    found = step_zero(trainer, source.draw(0, 0.0))
    assert 0 < found["divergence"] < 0.1
    with torch.no_grad():
        trainer.adapter.tensors["gate.bias"].mul_(5)  # gates (0, 1, 0) to seven digits
    shut = step_zero(trainer, source.draw(0, 0.0))
    assert shut["divergence"] < 1e-4
    assert shut["grown"] == pytest.approx(shut["training_free"], abs=1e-3)


def test_every_trained_tensor_of_every_layer_gets_a_gradient(base, source):
    trainer = make_trainer(base)
    disturb(trainer.adapter)
    trainer.losses(source.draw(1, 0.9)).loss.backward()
    for name, tensor in trainer.adapter.tensors.items():
        assert tensor.grad is not None, name
        assert tensor.grad.flatten(1).any(1).all(), name


def test_recomputed_mlps_change_no_gradient(base, source):
    batch, grads = source.draw(1, 0.9), []
    for recompute in (False, True):
        trainer = make_trainer(base)
        disturb(trainer.adapter)
        trainer.student.recompute = recompute
        trainer.losses(batch).loss.backward()
        grads.append(trainer.adapter.tensors["gate_up.lora_a"].grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_the_loss_falls(base, source):
    trainer = make_trainer(base)
    batch = source.draw(0, 0.0)
    losses = [float(trainer.step([batch], 10.0)[0][0].loss.detach()) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_step_whose_gradients_are_not_finite_changes_nothing(base, source):
    trainer = make_trainer(base)
    trainer.step([source.draw(0, 0.0)], 1.0)
    before = {name: tensor.detach().clone() for name, tensor in trainer.adapter.tensors.items()}
    trainer.optimiser.zero_grad()
    for tensor in trainer.adapter.tensors.values():
        tensor.grad = torch.full_like(tensor, torch.nan)
    trainer.drop_unless_finite(torch.tensor(torch.nan))
    trainer.optimiser.param_groups[0]["lr"] = 0.0
    assert all(not tensor.grad.any() for tensor in trainer.adapter.tensors.values())
    for name, tensor in trainer.adapter.tensors.items():
        assert torch.equal(tensor.detach(), before[name])


@pytest.mark.parametrize("case", ["norm", "split", "swiglu"])
def test_row_ops_have_the_gradients_of_their_formulas(base, case):
    ops, rows = RowOps.build(compiled=False), make_trainer(base).student.rows
    tensors = [torch.randn(5, 48, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if case == "norm":
        weight = torch.rand(48, dtype=torch.float64) + 0.5
        x, residual = tensors
        total = x + residual
        normed = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        pairs = zip(ops.add_rms_norm(x, residual, weight, 1e-5), (normed, total), strict=True)
    elif case == "swiglu":
        gate, up = tensors[0].chunk(2, -1)
        pairs = [(ops.swiglu_of(tensors[0]), F.silu(gate) * up)]
    else:
        fused = torch.randn(5, rows.total, dtype=torch.float64, requires_grad=True)
        tensors = [fused]
        angle = torch.randn(5, 8, dtype=torch.float64)
        cos, sin = angle.cos(), angle.sin()
        heads = fused[:, : rows.q].view(5, -1, 16)
        a, b = heads.chunk(2, -1)
        turned = torch.cat(
            [a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1
        )
        found = ops.split_rotate(fused, cos, sin, rows, 16)
        gates = fused[:, rows.qkv : rows.qkv + rows.gate].view(5, -1, 3)
        values = fused[:, rows.q + rows.k : rows.qkv].view(5, -1, 16)
        pairs = [(found[0], turned), (found[2], values), (found[3], gates)]
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        seed = torch.randn_like(plain)
        grads = [torch.autograd.grad(out, tensors, seed, retain_graph=True, allow_unused=True)
                 for out in (ours, plain)]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("taught", [False, True])
def test_head_loss_has_the_value_and_gradient_of_plain_autograd(monkeypatch, taught):
    monkeypatch.setattr("nsa_serve.train.head_loss._CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 12, generator=generator, requires_grad=True)
    head = torch.randn(30, 12, generator=generator)
    teacher = torch.randn(7, 12, generator=generator) if taught else None
    targets = torch.randint(30, (7,), generator=generator)
    ce, kl = torch.rand(7, generator=generator), torch.rand(7, generator=generator) * taught
    loss, tokens = head_loss(
        hidden, head, targets, ce=ce, kl=kl, taught=teacher, ops=RowOps.build(compiled=False)
    )
    logp = (hidden @ head.T).log_softmax(-1)
    plain = (ce * F.nll_loss(logp, targets, reduction="none")).sum()
    if teacher is not None:
        p = (teacher @ head.T).log_softmax(-1)
        plain = plain + (kl * F.kl_div(logp, p, log_target=True, reduction="none").sum(1)).sum()
    torch.testing.assert_close(loss, plain)
    ours, wanted = (torch.autograd.grad(out, hidden)[0] for out in (loss, plain))
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens.right.bool(), logp.argmax(-1) == targets)


def test_the_importance_loss_teaches_pooled_keys_where_attention_goes():
    nsa = replace(TINY_NSA, num_selected=4)
    generator = torch.Generator().manual_seed(1)
    length, heads = 256, 2
    q = 2 * torch.randn(length, 4, 16, generator=generator)
    k = 2 * torch.randn(length, heads, 16, generator=generator)
    down = (torch.randn(heads, 8 * 16, 16, generator=generator) * 0.1).requires_grad_()
    up = torch.zeros(heads, 16, 16).requires_grad_()
    probe = Probe(0, length, torch.arange(80, length, 4))
    batch = PackedBatch.build([length], nsa=nsa, device=CPU)
    optimiser = torch.optim.Adam([down, up], lr=0.02)
    found = []
    for _ in range(60):
        phi = Compressor(k=Phi(CompressKind.LINEAR, down=down, up=up))
        entries = compress_keys(k, batch, nsa=nsa, compressor=phi)
        loss, caught = probe_loss(q[probe.positions], k, entries, probe, nsa)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append((float(loss.detach()), float(caught)))
    assert found[-1][0] < 0.7 * found[0][0]
    assert found[-1][1] > found[0][1]


def test_the_importance_loss_is_the_divergence_of_block_shares_from_those_of_attention():
    """Against its definition, in fp64 and by loops over tokens."""
    nsa, heads, dim = replace(TINY_NSA, num_initial=1, num_local=2), 2, 16
    batch = PackedBatch.build([64, 160], nsa=nsa, device=CPU)
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(224, 4, dim, generator=generator, dtype=torch.float64)
    k = 2 * torch.randn(224, heads, dim, generator=generator, dtype=torch.float64)
    positions = torch.tensor([70, 111, 159])
    # A probe of the first sequence beside it, where every block is forced: its loss is 0.
    losses = ImportanceLoss([Probe(0, 64, torch.tensor([20, 30])), Probe(64, 160, positions)], nsa)
    losses.add(q, k, compress_keys(k, batch, nsa=nsa, compressor=Compressor()))
    none, found = losses.losses
    assert float(none) == 0
    wanted = []
    for head in range(heads):
        keys = k[64:, head]
        entries = torch.stack([keys[at : at + 8].mean(0) for at in range(0, 153, 4)])
        for position in positions.tolist():
            own = q[64 + position, 2 * head : 2 * head + 2] / dim**0.5
            mass = F.softmax(own @ keys[: position + 1].T, -1).mean(0)
            visible = (position - 7) // 4 + 1
            p = F.softmax(own @ entries[:visible].T, -1).mean(0)
            free = range(1, position // 16 - 1)
            true = torch.stack([mass[16 * b : 16 * b + 16].sum() for b in free])
            strides = [p[max(0, s - 1) : s + 1].sum() for s in range(visible + 1)]
            score = torch.stack([sum(strides[4 * b : 4 * b + 4]) for b in free])
            share, given = true / true.sum(), score / score.sum()
            wanted.append(true.sum() * (share * (share / given).log()).sum())
    torch.testing.assert_close(found, torch.stack(wanted).mean(), atol=1e-6, rtol=1e-5)


def test_the_shipped_adapter_fits_its_files():
    config = model_config(resolve(ModelSource()))
    adapter = AdapterConfig()
    model = grown_config(config, config.rope, 65_536, adapter)
    numbers = sum(torch.Size(shape).numel() for shape in adapter_shapes(model, adapter).values())
    assert 2 * numbers < 23_500_000  # two bytes each, of 24 MB


def test_an_adapters_configuration_is_read_as_it_was_written(base, tmp_path):
    model = make_trainer(base).adapter.model
    (tmp_path / "config.json").write_text(json.dumps(config_json(model)))
    _, read = open_model(tmp_path, random_weights=True)
    assert read == model


def test_an_adapter_with_other_ranks_is_of_other_shapes(base):
    trainer = make_trainer(base)
    config = AdapterConfig({"qkv": 2}, phi_rank=3, shape=TINY_NSA)
    model = replace(trainer.adapter.model, nsa=grown_config(
        trainer.teacher.config, trainer.adapter.model.rope, 64, config).nsa)  # fmt: skip
    adapter = Adapter.create(model, config, device=CPU, seed=0)
    assert {name for name in adapter.tensors if "lora" in name} == {"qkv.lora_a", "qkv.lora_b"}
    merged = adapter.merged(trainer.base, torch.float32)
    assert {name: tuple(w.shape) for name, w in merged.items()} == parameter_shapes(model)


def test_bf16_training_is_fp32_training_but_for_rounding(base, source):
    asked = (batch for batch in map(source.draw, range(20), [0.0] * 20) if batch.answers.any())
    batch, found = next(asked), []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(base, dtype=dtype)
        disturb(trainer.adapter)
        losses = trainer.losses(batch)
        losses.loss.backward()
        assert all(t.grad.dtype == torch.float32 for t in trainer.adapter.tensors.values())
        found.append(losses)
    for name in ("loss", "text", "answer", "teacher"):
        one, other = (float(getattr(losses, name).detach()) for losses in found)
        assert one == pytest.approx(other, rel=0.05), name


def test_the_stretched_rotary_embedding_leaves_what_turns_often_and_sharpens_nothing(base):
    config = replace(open_model(base)[1], rope=RopeConfig(theta=100_000.0), max_position=8192)
    ours, scale = inverse_frequencies(grown_rope(config, 65_536, None), 64, 65_536)
    theirs, _ = inverse_frequencies(config.rope, 64, 8192)
    assert scale == 1.0
    turns = 8192 * theirs / (2 * math.pi)
    assert torch.equal(ours[turns > 8], theirs[turns > 8])
    assert int((turns > 8).sum()) > 12
    torch.testing.assert_close(ours[turns < 0.5], theirs[turns < 0.5] / 8)
    assert int((turns < 0.5).sum()) > 4
