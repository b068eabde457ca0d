"""Selected pages in host memory: hits, misses, victims, and attention that cannot tell them."""

import dataclasses

import pytest
import torch

from nsa_serve.kernels import gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.shapes import UNCLAIMED

from .gpu_steps import SMALL
from .tiered_steps import BOOKS, any_selection, make_hot, next_step, tiered_step

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
    lookups, hits, fetched = hot.counts[:3].tolist()
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
        for name in BOOKS:
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
    assert hot.counts[:3].tolist() == [9, 3, 5]


@OPS
def test_a_block_that_many_tokens_miss_is_fetched_once(ops):
    _, tiered, hot = tiered_step([333], [40], num_hot=8, hkv=1, hq=1)
    away = (tiered.batch.slot_table[0] >= tiered.kv.k.shape[0]).nonzero()[:, 0].int()
    selection = torch.full((40, 1, SMALL.num_selected), -1, dtype=torch.int32)
    selection[:, 0, :2] = away[:2]
    slots = ops.fetch_blocks(selection, tiered.kv, hot, tiered.batch)
    assert hot.counts[:3].tolist() == [80, 0, 2]
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


def far(step):
    """Pages in host memory of a step's first row."""
    return (step.batch.slot_table[0] >= step.kv.k.shape[0]).nonzero()[:, 0].int()


def listed(pages, width, tokens=1):
    """The same ``pages`` [m] for each token, −1 padded: [tokens, 1, width]."""
    found = torch.full((tokens, 1, width), -1, dtype=torch.int32)
    found[:, 0, : len(pages)] = pages.sort().values
    return found


def hot_pages(step, hot):
    """Which of the far pages are hot, by their rank among them."""
    blocks = step.batch.block_table[0, far(step).long()].tolist()
    return {at for at, block in enumerate(blocks) if int(hot.places[0, block]) >= 0}


@OPS
def test_runners_up_take_slots_unused_for_long_and_none_of_the_last_steps(ops):
    _, tiered, hot = tiered_step([400], [1], num_hot=4, hkv=1, hq=1)
    pages, rows = far(tiered), tiered.batch.token_rows

    def step(selected, runners_up, age):
        ops.fetch_blocks(listed(pages[selected], 4), tiered.kv, hot, tiered.batch)
        wanted = listed(pages[[*selected, *runners_up]], 7)
        ops.prefetch_blocks(wanted, rows, tiered.kv, hot, tiered.batch, age=age)
        next_step(hot)
        return hot_pages(tiered, hot)

    assert step([0, 1], [2], 2) == {0, 1, 2}  # empty slots are taken first
    assert step([0], [3, 4], 2) == {0, 1, 3, 4}  # 2 counts as used before 1 was
    assert step([0], [2, 5], 2) == {0, 1, 2, 5}
    assert step([0], [3], 3) == {0, 1, 2, 5}  # all were used, or came, too lately for 3
    assert hot.counts.tolist() == [5, 3, 2, 5, 0]
    assert step([0, 2], [], 2) == {0, 1, 2, 5}
    assert step([2], [], 2) == {0, 1, 2, 5}
    assert hot.counts.tolist() == [8, 6, 2, 5, 1]  # a piece that came early is counted once


@OPS
def test_the_next_chunks_pages_take_even_slots_of_this_chunk(ops):
    _, tiered, hot = tiered_step([400], [20], num_hot=2, hkv=1, hq=1)
    pages = far(tiered)
    chunk = listed(pages[[0, 1]], 4, tokens=20)
    chunk[-1] = listed(pages[[1, 3]], 4)[0]
    rows = torch.zeros(1, dtype=torch.int32)
    ops.fetch_blocks(chunk, tiered.kv, hot, tiered.batch)
    assert hot_pages(tiered, hot) == {0, 1}
    ops.prefetch_blocks(chunk[-1:], rows, tiered.kv, hot, tiered.batch, age=-1)
    assert hot_pages(tiered, hot) == {1, 3}
    next_step(hot)
    slots = ops.fetch_blocks(listed(pages[[1, 3]], 4, tokens=20), tiered.kv, hot, tiered.batch)
    assert (slots[..., :2] < tiered.kv.k.shape[0]).all()
    assert hot.counts.tolist() == [80, 40, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_hot", "age"), [(1, -1), (9, 1), (9, -1), (40, 3)])
def test_both_twins_prefetch_alike_between_fetches(num_hot, age, dtype):
    shape = {"num_hot": num_hot, "padding": 1, "dtype": dtype}
    steps = [tiered_step(*DECODE, **shape) for _ in range(2)]
    wide = dataclasses.replace(SMALL, num_selected=7)
    for seed in range(4):
        books = []
        for ops, (_, step, hot) in zip((reference, gpu), steps, strict=True):
            selection = any_selection(step.batch, 2, SMALL, seed % 3)
            wanted = any_selection(step.batch, 2, wide, seed % 3)
            slots = ops.fetch_blocks(selection, step.kv, hot, step.batch)
            ops.prefetch_blocks(wanted, step.batch.token_rows, step.kv, hot, step.batch, age=age)
            next_step(hot)
            books.append([slots, *(getattr(hot, name) for name in BOOKS)])
        for name, found, twin in zip(("slots", *BOOKS), *books, strict=True):
            assert torch.equal(found, twin), name
    (_, one, hot), (_, other, _) = steps
    torch.testing.assert_close(one.kv.k, other.kv.k, equal_nan=True, rtol=0, atol=0)
    assert hot.counts[3] > 0 or num_hot == 1


@OPS
def test_what_was_prefetched_is_what_is_read(ops):
    plain, tiered, hot = tiered_step(*DECODE, num_hot=40)
    wide = dataclasses.replace(SMALL, num_selected=7)
    wanted = any_selection(plain.batch, 2, wide, 1)
    ops.prefetch_blocks(wanted, plain.batch.token_rows, tiered.kv, hot, tiered.batch, age=4)
    assert hot.counts[:3].tolist() == [0, 0, 0]
    next_step(hot)
    slots = ops.fetch_blocks(wanted, tiered.kv, hot, tiered.batch)
    expected = contents(plain, wanted)
    torch.testing.assert_close(pieces(tiered.kv, slots), expected, equal_nan=True, rtol=0, atol=0)
    lookups, hits, fetched, prefetched, foreseen = hot.counts.tolist()
    assert lookups == hits == prefetched == foreseen > 0 == fetched


@OPS
def test_a_step_without_host_pages_is_refused(ops):
    plain, _, _ = tiered_step(*DECODE, num_hot=1)
    hot = make_hot(plain.kv, 64, 1)
    with pytest.raises(ContractError, match="no host pages"):
        ops.fetch_blocks(any_selection(plain.batch, 2, SMALL, 0), plain.kv, hot, plain.batch)
    with pytest.raises(ContractError, match="no host pages"):
        ops.prefetch_blocks(
            any_selection(plain.batch, 2, SMALL, 0), plain.batch.token_rows, plain.kv, hot,
            plain.batch, age=1,
        )  # fmt: skip


def test_host_pages_of_other_strides_are_refused():
    _, tiered, _ = tiered_step(*DECODE, num_hot=1)
    host = tiered.kv.host
    turned = dataclasses.replace(host, k=host.k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ContractError, match="strided otherwise"):
        dataclasses.replace(tiered.kv, host=turned)
