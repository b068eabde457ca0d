"""Checkpoints of our own format: the forward pass is nsa.md's, however a prompt is chunked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nsa_serve.config import AttentionMode
from nsa_serve.errors import ConfigError
from nsa_serve.kernels.shapes import NSAShape
from nsa_serve.models.config import ModelConfig, NSAConfig, PhiConfig, with_attention, with_context
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.loader import load_decoder
from nsa_serve.models.rope import inverse_frequencies

from . import oracle
from .checkpoints import (
    CPU,
    PHIS,
    TINY_LLAMA,
    TINY_NSA,
    gated,
    nsa_config_json,
    open_model,
    write_checkpoint,
)
from .model_steps import PagedModel

LENGTH = 131


def load(folder: Path) -> tuple[Decoder, ModelConfig]:
    checkpoint, config = open_model(folder)
    return load_decoder(checkpoint, config, device=CPU, dtype=torch.float32), config


def prompt_ids(length: int) -> list[int]:
    # The same each time: a near tie between blocks would change later tokens of a deep model.
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, TINY_LLAMA["vocab_size"], (length,), generator=generator).tolist()


class OracleModel:
    """The model in fp64 from the paper's definitions and the checkpoint's own tensor names."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.config = config
        self.tensors = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        self.near_ties: set[int] = set()
        self.inv_freq, _ = inverse_frequencies(config.rope, config.head_dim_k, 512)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def phi(self, name: str, tokens: Tensor, phi: PhiConfig, inv_freq: Tensor | None) -> Tensor:
        parts = ("position", "weight", "down", "up")
        found = {part: self.tensors.get(f"{name}.{part}") for part in parts}
        shape = self.config.nsa.shape
        sizes = {"l": shape.compress_len, "d": shape.compress_stride}
        return oracle.entries(tokens, phi.kind.value, **sizes, inv_freq=inv_freq, **found)

    def attention(self, name: str, x: Tensor) -> Tensor:
        config, nsa = self.config, self.config.nsa
        q, raw_k, v = (
            self.linear(f"{name}.{part}_proj", x).unflatten(1, (heads, -1))
            for part, heads in zip("qkv", (6, 2, 2), strict=True)
        )
        if config.qk_norm:
            q, raw_k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", raw_k)
        positions = list(range(len(x)))
        rotated = [
            torch.stack([oracle.rotate(part[t], t, self.inv_freq) for t in positions])
            for part in (q, raw_k)
        ]
        q, k = rotated
        entries_k = self.phi(
            f"{name}.compress_k",
            raw_k if nsa.before_rope else k,
            nsa.phi_k,
            self.inv_freq if nsa.before_rope else None,
        )
        entries_v = self.phi(f"{name}.compress_v", v, nsa.phi_v, None)
        branches = self.branches(q, k, v, entries_k, entries_v, positions, nsa.shape)
        if not nsa.gated:
            return self.linear(f"{name}.o_proj", branches[1].flatten(1))
        gates = self.linear(f"{name}.gate", x).unflatten(1, (-1, 3))
        return self.linear(f"{name}.o_proj", oracle.gated(branches, gates).flatten(1))

    def branches(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        entries_k: Tensor,
        entries_v: Tensor,
        positions: list[int],
        nsa: NSAShape,
    ) -> list[Tensor]:
        l, d, page = nsa.compress_len, nsa.compress_stride, nsa.page  # noqa: E741
        out_compressed, shares = oracle.compressed(q, entries_k, entries_v, positions, l=l, d=d)
        selection = []
        for t, share in zip(positions, shares, strict=True):
            rows = oracle.scores(share, t, num_kv_heads=2, l=l, d=d, page=page)
            sizes = {"page": page, "n": nsa.num_selected, "initial": 1, "local": 2}
            selection.append([oracle.select(row, t, **sizes) for row in rows])
            self.note_near_ties(t, rows, selection[-1])
        out_selected = oracle.selected(q, k, v, positions, selection, page=page)
        return [out_compressed, out_selected, oracle.window(q, k, v, positions, w=nsa.window)]

    def note_near_ties(self, t: int, rows: Tensor, chosen: list[list[int]]) -> None:
        """Remember tokens whose choice of blocks is within fp32's rounding of another one."""
        local = range(max(0, len(rows[0]) - 2), len(rows[0]))
        for row, blocks in zip(rows.tolist(), chosen, strict=True):
            free = [row[j] for j in blocks if j != 0 and j not in local]
            others = [row[j] for j in range(len(row)) if j not in blocks]
            if free and others and min(free) - max(others) < 1e-5:
                self.near_ties.add(t)

    def logits(self, ids: list[int]) -> Tensor:
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(self.config.num_layers):
            name = f"model.layers.{layer}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
            y = self.norm(f"{name}.post_attention_layernorm", x)
            gate, up = (self.linear(f"{name}.mlp.{part}_proj", y) for part in ("gate", "up"))
            x = x + self.linear(f"{name}.mlp.down_proj", F.silu(gate) * up)
        return self.linear("lm_head", self.norm("model.norm", x))


def assert_equals_oracle(folder: Path, ids: list[int]) -> None:
    decoder, config = load(folder)
    found = PagedModel(decoder, [len(ids)]).prefill(ids, sizes=(50, 1, 40))
    model = OracleModel(folder, config)
    expected = model.logits(ids)
    # With one layer a near tie concerns its own token alone.
    rows = [t for t in range(len(ids)) if t not in model.near_ties]
    assert len(rows) > 0.9 * len(ids)
    torch.testing.assert_close(found[rows].double(), expected[rows], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("before_rope", [False, True])
@pytest.mark.parametrize("phi", PHIS)
def test_the_forward_pass_is_the_papers(tmp_path: Path, phi: str, before_rope: bool) -> None:
    nsa = gated(PHIS[phi], before_rope=before_rope)
    write_checkpoint(tmp_path, nsa_config_json(nsa, num_hidden_layers=1))
    assert_equals_oracle(tmp_path, prompt_ids(90))


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim_v": 8},
        {"qk_norm": True},
        {"attention_bias": True},
        {"nsa": {"gated": False}},
        {"nsa": {"gate_bias": False}},
    ],
    ids=str,
)
def test_every_option_of_our_format_is_honoured(tmp_path: Path, changes: dict) -> None:
    config = nsa_config_json(gated(PHIS["weighted"]), num_hidden_layers=1)
    nsa = {**config["nsa"], **changes.pop("nsa", {})}
    nsa["gate_bias"] = nsa["gate_bias"] and nsa["gated"]
    write_checkpoint(tmp_path, {**config, **changes, "nsa": nsa})
    assert_equals_oracle(tmp_path, prompt_ids(90))


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("before_rope", [False, True])
def test_chunks_and_decodes_equal_the_whole_prefill(
    tmp_path: Path, phi: str, before_rope: bool
) -> None:
    nsa = gated(PHIS[phi], before_rope=before_rope)
    decoder, _ = load(write_checkpoint(tmp_path, nsa_config_json(nsa)))
    ids = prompt_ids(LENGTH)
    whole = PagedModel(decoder, [LENGTH]).prefill(ids)
    for seed, sizes in enumerate([(1,), (15, 17, 64), (63, 1, 1), (100, 1)]):
        found = PagedModel(decoder, [LENGTH], seed=seed + 1).prefill(ids, sizes)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_requests_of_one_step_do_not_see_each_other(tmp_path: Path) -> None:
    decoder, _ = load(write_checkpoint(tmp_path, nsa_config_json(gated(PHIS["linear"]))))
    prompts = [prompt_ids(length) for length in (33, 1, 97)]
    together = PagedModel(decoder, [len(ids) for ids in prompts], seed=5)
    hidden = together.step([(row, 0, ids) for row, ids in enumerate(prompts)])
    for ids, found in zip(prompts, hidden.split([33, 1, 97]), strict=True):
        alone = PagedModel(decoder, [len(ids)]).step([(0, 0, ids)])
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_the_host_tiers_slots_reach_the_selected_branch(tmp_path: Path) -> None:
    decoder, config = load(write_checkpoint(tmp_path, nsa_config_json(gated(PHIS["mean"]))))
    asked: list[tuple[int, list[int]]] = []

    def resident(layer: int, selection: Tensor) -> Tensor:
        asked.append((layer, list(selection.shape)))
        table = model.tables.slot_table[0].long()
        return torch.where(selection >= 0, table[selection.clamp_min(0).long()].int(), -1)

    ids = prompt_ids(LENGTH)
    expected = PagedModel(decoder, [LENGTH]).prefill(ids)
    model = PagedModel(decoder, [LENGTH], resident=resident)
    torch.testing.assert_close(model.prefill(ids), expected, atol=1e-4, rtol=1e-4)
    shape = [LENGTH, config.num_kv_heads, TINY_NSA.num_selected]
    assert asked == [(layer, shape) for layer in range(config.num_layers)]


def test_attention_modes_choose_as_the_flag_says(tmp_path: Path) -> None:
    _, dense = open_model(write_checkpoint(tmp_path / "dense", TINY_LLAMA))
    trained = nsa_config_json(gated(PHIS["linear"]))
    _, nsa = open_model(write_checkpoint(tmp_path / "nsa", trained))
    assert with_attention(dense, AttentionMode.AUTO) == dense
    assert with_attention(dense, AttentionMode.DENSE) == dense
    assert with_attention(dense, AttentionMode.NSA).nsa == NSAConfig()
    assert with_attention(nsa, AttentionMode.AUTO) == nsa
    assert with_attention(nsa, AttentionMode.NSA) == nsa
    with pytest.raises(ConfigError, match="--attention dense"):
        with_attention(nsa, AttentionMode.DENSE)


def test_an_ungated_checkpoint_serves_dense_and_leaves_its_phi(tmp_path: Path) -> None:
    ungated = NSAConfig(TINY_NSA, PHIS["linear"], PHIS["mean"])
    checkpoint, config = open_model(write_checkpoint(tmp_path, nsa_config_json(ungated)))
    config = with_attention(config, AttentionMode.DENSE)
    decoder = load_decoder(checkpoint, config, device=CPU, dtype=torch.float32)
    nsa, _ = load(tmp_path)
    # Every block is selected while there are at most n: the same function.
    ids = prompt_ids(TINY_NSA.dense_len)
    found = PagedModel(decoder, [len(ids)]).prefill(ids)
    expected = PagedModel(nsa, [len(ids)]).prefill(ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_context_beyond_the_checkpoints_is_refused(tmp_path: Path) -> None:
    _, config = open_model(write_checkpoint(tmp_path, TINY_LLAMA))
    assert with_context(config, None) == config
    assert with_context(config, 100).max_position == 100
    with pytest.raises(ConfigError, match=r"--max-model-len 513 .* 512"):
        with_context(config, 513)


def test_the_nsa_object_survives_being_written_and_read(tmp_path: Path) -> None:
    low_rank = PHIS["linear low rank"]
    nsa = NSAConfig(TINY_NSA, low_rank, PHIS["mlp"], before_rope=True, gated=True)
    _, config = open_model(write_checkpoint(tmp_path, nsa_config_json(nsa)))
    assert config.nsa == nsa
