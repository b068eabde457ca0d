"""Selected pages in host memory: hits, misses, victims, and attention that cannot tell them."""

import dataclasses

import pytest
import torch

from nsa_serve.kernels import gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.shapes import UNCLAIMED

from .gpu_steps import SMALL
from .tiered_steps import any_selection, make_hot, next_step, tiered_step

OPS = pytest.mark.parametrize("ops", [reference, gpu], ids=["torch", "triton"])
DECODE = ([200, 333, 16], [1, 1, 1])
MIXED = ([200, 150], [1, 12])


def pieces(kv, slots):
    """What ``slots`` [T, Hkv, n] name: [T, Hkv, n, P, Dk + Dv], zeros for −1."""
    joined = [torch.cat([x, y]) for x, y in ((kv.k, kv.host.k), (kv.v, kv.host.v))]
    heads = torch.arange(slots.shape[1])[:, None]
    found = torch.cat([x[slots.clamp(min=0).long(), heads] for x in joined], -1)
    return torch.where((slots >= 0)[..., None, None], found, 0)


def contents(step, selection):
    """What the selection names where every page is on the device."""
    batch = step.batch
    slots = batch.slot_table[
        batch.token_rows.long()[:, None, None], selection.clamp(min=0).long()
    ].where(selection >= 0, -1)
    heads = torch.arange(selection.shape[1])[:, None]
    found = [x[slots.clamp(min=0).long(), heads] for x in (step.kv.k, step.kv.v)]
    return torch.where((slots >= 0)[..., None, None], torch.cat(found, -1), 0)


@OPS
@pytest.mark.parametrize("num_hot", [1, 5, 40])
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_every_slot_names_the_piece_of_the_selected_block(ops, num_hot, shape):
    plain, tiered, hot = tiered_step(*shape, num_hot=num_hot, padding=2)
    for seed in range(3):
        selection = any_selection(plain.batch, 2, SMALL, seed)
        slots = ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
        assert ((slots < 0) == (selection < 0)).all()
        expected = contents(plain, selection)
        torch.testing.assert_close(
            pieces(tiered.kv, slots), expected, equal_nan=True, rtol=0, atol=0
        )
        next_step(hot)
    lookups, hits, fetched = hot.counts.tolist()
    assert lookups > hits >= 0 < fetched


@pytest.mark.parametrize("num_hot", [1, 6, 40])
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_both_twins_keep_the_same_books_over_many_steps(num_hot, shape):
    _, one, hot = tiered_step(*shape, num_hot=num_hot, padding=1)
    _, other, hot_other = tiered_step(*shape, num_hot=num_hot, padding=1)
    for seed in range(4):
        selection = any_selection(one.batch, 2, SMALL, seed % 3)
        slots = reference.fetch_blocks(selection, one.kv, hot, one.batch)
        twin = gpu.fetch_blocks(selection, other.kv, hot_other, other.batch)
        assert torch.equal(slots, twin)
        for name in ("owners", "places", "last_used", "counts", "claims"):
            assert torch.equal(getattr(hot, name), getattr(hot_other, name)), name
        assert (hot_other.claims == UNCLAIMED).all()
        next_step(hot)
        next_step(hot_other)
    torch.testing.assert_close(one.kv.k, other.kv.k, equal_nan=True, rtol=0, atol=0)


@OPS
def test_the_block_used_longest_ago_makes_room(ops):
    _, tiered, hot = tiered_step([400], [1], num_hot=3, hkv=1, hq=1)
    away = (tiered.batch.slot_table[0] >= tiered.kv.k.shape[0]).nonzero()[:, 0].int()
    assert len(away) >= 5

    def ask(*pages):
        chosen = torch.full((1, 1, SMALL.num_selected), -1, dtype=torch.int32)
        chosen[0, 0, : len(pages)] = away[list(pages)].sort().values
        ops.fetch_blocks(chosen, tiered.kv, hot, tiered.batch)
        next_step(hot)
        blocks = tiered.batch.block_table[0, away.long()].tolist()
        return {blocks.index(block) for block in hot.owners[0].tolist() if block >= 0}

    assert ask(0, 1) == {0, 1}
    assert ask(2) == {0, 1, 2}
    assert ask(0) == {0, 1, 2}
    assert ask(3) == {0, 2, 3}
    assert ask(0, 3, 4, 1) == {0, 3, 1}  # both hits stay; of two misses the first takes the slot
    assert hot.counts.tolist() == [9, 3, 5]


@OPS
def test_a_block_that_many_tokens_miss_is_fetched_once(ops):
    _, tiered, hot = tiered_step([333], [40], num_hot=8, hkv=1, hq=1)
    away = (tiered.batch.slot_table[0] >= tiered.kv.k.shape[0]).nonzero()[:, 0].int()
    selection = torch.full((40, 1, SMALL.num_selected), -1, dtype=torch.int32)
    selection[:, 0, :2] = away[:2]
    slots = ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
    assert hot.counts.tolist() == [80, 0, 2]
    assert slots[:, 0, :2].unique().numel() == 2


@OPS
def test_an_entry_that_was_forgotten_is_fetched_again(ops):
    """Its block was given to other tokens: ``places`` is cleared, the owner's name stays."""
    plain, tiered, hot = tiered_step(*DECODE, num_hot=64)
    selection = any_selection(plain.batch, 2, SMALL, 0)
    ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
    before = hot.counts.clone()
    next_step(hot)
    hot.places.fill_(-1)
    slots = ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
    assert (hot.counts - before).tolist() == before.tolist()
    expected = contents(plain, selection)
    torch.testing.assert_close(pieces(tiered.kv, slots), expected, equal_nan=True, rtol=0, atol=0)


@OPS
@pytest.mark.parametrize("num_hot", [1, 64])
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_attention_reads_hot_and_host_pages_as_if_they_were_on_the_device(ops, num_hot, shape):
    plain, tiered, hot = tiered_step(*shape, num_hot=num_hot, padding=1)
    selection = any_selection(plain.batch, 2, SMALL, 3)
    gates = torch.randn(plain.q.shape[0], 4, 3, generator=torch.Generator().manual_seed(1))
    compressed = torch.zeros_like(plain.q)
    expected = reference.sparse_attention(
        plain.q, plain.kv, selection, compressed, gates, plain.batch, nsa=SMALL
    )
    slots = ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
    assert (slots >= tiered.kv.k.shape[0]).any() == (num_hot == 1)
    out = ops.sparse_attention(
        tiered.q, tiered.kv, selection, compressed, gates, tiered.batch, nsa=SMALL, slots=slots
    )
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@OPS
def test_a_step_without_host_pages_is_refused(ops):
    plain, _, _ = tiered_step(*DECODE, num_hot=1)
    hot = make_hot(plain.kv, 64, 1)
    with pytest.raises(ContractError, match="no host pages"):
        ops.fetch_blocks(any_selection(plain.batch, 2, SMALL, 0), plain.kv, hot, plain.batch)


def test_host_pages_of_other_strides_are_refused():
    _, tiered, _ = tiered_step(*DECODE, num_hot=1)
    host = tiered.kv.host
    turned = dataclasses.replace(host, k=host.k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ContractError, match="strided otherwise"):
        dataclasses.replace(tiered.kv, host=turned)
