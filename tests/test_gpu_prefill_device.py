"""The prefill kernels on a GPU: the numbers of the references, at borders, at a million tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.gpu.compressed_attention import compressed_attention
from nsa_serve.kernels.gpu.gated_fusion import sparse_attention
from nsa_serve.kernels.gpu.score_pass import SCRATCH_BYTES
from nsa_serve.kernels.gpu.selected_attention import selected_attention
from nsa_serve.kernels.gpu.window_attention import window_attention
from nsa_serve.kernels.shapes import CompressedKV, NSAShape, PagedKV, StepBatch
from tests.gpu_steps import Step, make_step
from tests.kernel_runs import LAYOUTS, poisoned_memory

pytestmark = pytest.mark.gpu

NSA = NSAShape()
# Beside multiples of d, l, a page, w and n·P; each is a context, or where a chunk starts.
BORDERS = [16, 32, 64, 512, 1024, 2048]
LENGTHS = [border + off for border in BORDERS for off in (-1, 0, 1)]


def prefill_step(
    layout: tuple[int, int, int, int],
    contexts: list[int],
    queries: list[int],
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    hq, hkv, dk, dv = layout
    sizes = {"hq": hq, "hkv": hkv, "dk": dk, "dv": dv}
    return make_step(contexts, queries, NSA, **sizes, dtype=dtype, padding=3, device="cuda")


def random_gates(tokens: int, heads: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(5)
    return torch.randn(tokens, heads, 3, generator=generator, device="cuda").bfloat16()


def assert_near(out: Tensor | None, wanted: Tensor | None) -> None:
    assert out is not None
    assert wanted is not None
    # Short contexts have no compressed entry, and outputs of exactly 0.
    error = (out.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    assert float(error) <= 1e-2  # False for NaN as well


def importance(step: Step, row: int, tokens: slice) -> Tensor:
    """Scores [t, Hkv, blocks] of a row's tokens from the softmax over its entries in fp64."""
    q, batch = step.q[tokens].double(), step.batch
    pages = step.compressed.k[batch.block_table[row].long().clamp(min=0)]  # [m, Hkv, P/d, Dk]
    k = pages.transpose(0, 1).flatten(1, 2)[:, NSA.overlap - 1 :].double()
    group = q.shape[1] // k.shape[0]
    s = torch.einsum("tkgd,kcd->tkgc", q.unflatten(1, (k.shape[0], group)), k)
    ends = torch.arange(k.shape[1], device="cuda") * NSA.compress_stride + NSA.compress_len - 1
    hidden = ends > batch.positions[tokens, None]
    s = (s * q.shape[2] ** -0.5).masked_fill(hidden[:, None, None], -torch.inf)
    p = s.softmax(-1).nan_to_num(0.0).flatten(1, 2).float()
    return reference.block_scores(p, nsa=NSA, num_kv_heads=k.shape[0])


def assert_selection(step: Step, selection: Tensor) -> None:
    """Ascending, whole, with all forced blocks, and the highest scores but for equal ones."""
    borders = step.batch.cu_seqlens_q.tolist()
    assert bool((selection[borders[-1] :] == -1).all())
    for row in range(step.batch.num_rows):
        tokens = slice(borders[row], borders[row + 1])
        scores = importance(step, row, tokens)
        current = step.batch.positions[tokens] // NSA.page
        wanted = reference.select_blocks(scores, step.batch.positions[tokens], nsa=NSA)
        chosen = selection[tokens]
        assert torch.equal(chosen >= 0, wanted >= 0)
        assert bool(((chosen.diff() > 0) | (chosen[..., 1:] < 0)).all())
        for forced in (current * 0, (current - 1).clamp(min=0), current):
            assert bool((chosen == forced[:, None, None]).any(-1).all())
        best, found = (
            scores.gather(2, blocks.long().clamp(min=0)).where(blocks >= 0, 0).sum(-1)
            for blocks in (wanted, chosen)
        )
        assert bool((best - found <= 1e-4).all())


def assert_layer_is_the_references(step: Step) -> None:
    batch, gates = step.batch, random_gates(*step.q.shape[:2])
    with poisoned_memory():
        out, selection = compressed_attention(step.q, step.compressed, batch, nsa=NSA)
        selected = selected_attention(step.q, step.kv, selection, batch, nsa=NSA)
        window = window_attention(step.q, step.kv, batch, nsa=NSA)
        fused = sparse_attention(step.q, step.kv, selection, out, gates, batch, nsa=NSA)
    wanted, _ = reference.compressed_attention(step.q, step.compressed, batch, nsa=NSA)
    assert_selection(step, selection)
    assert_near(out, wanted)
    arguments = (step.q, step.kv, selection)
    assert_near(selected, reference.selected_attention(*arguments, batch, nsa=NSA))
    assert_near(window, reference.window_attention(step.q, step.kv, batch, nsa=NSA))
    assert_near(fused, reference.sparse_attention(*arguments, out, gates, batch, nsa=NSA))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_steps_at_all_borders_are_the_references(
    layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    chunks = [(length, min(length, 40 + length % 7)) for length in LENGTHS]
    chunks += [(length + 70, 70) for length in LENGTHS]
    chunks += [(1, 1), (3000, 1), (1500, 3), (2500, 2500)]
    step = prefill_step(layout, *(list(column) for column in zip(*chunks, strict=True)), dtype)
    assert_layer_is_the_references(step)


@pytest.mark.parametrize("rows", [1, 31, 256])
def test_batches_of_many_ragged_rows_are_the_references(rows: int) -> None:
    contexts = [LENGTHS[5 * row % len(LENGTHS)] + row % 3 for row in range(rows)]
    queries = [min(context, 1 + 13 * row % 37) for row, context in enumerate(contexts)]
    queries[0] = min(contexts[0], 12)  # else a step of one row could be a decode
    assert_layer_is_the_references(prefill_step(LAYOUTS[0], contexts, queries))


def chunk_of(step: Step, start: int, stop: int) -> tuple[StepBatch, slice]:
    """The part of a one-row prompt from ``start`` on as a step of its own."""
    tokens = slice(start, stop)
    ints = {"dtype": torch.int32, "device": "cuda"}
    batch = replace(
        step.batch,
        positions=step.batch.positions[tokens],
        token_rows=step.batch.token_rows[tokens],
        cu_seqlens_q=torch.tensor([0, stop - start], **ints),
        context_lens=torch.tensor([stop], **ints),
        max_query_len=stop - start,
        max_context_len=stop,
    )
    return batch, tokens


def attend(step: Step, batch: StepBatch, tokens: slice, gates: Tensor) -> list[Tensor | None]:
    q = step.q[tokens]
    out, selection = compressed_attention(q, step.compressed, batch, nsa=NSA)
    fused = sparse_attention(q, step.kv, selection, out, gates[tokens], batch, nsa=NSA)
    return [out, selection, fused]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_chunks_of_a_prompt_have_the_bytes_of_the_whole(
    layout: tuple[int, int, int, int],
) -> None:
    length = 5000
    step = prefill_step(layout, [length], [length])
    gates = random_gates(*step.q.shape[:2])
    whole = attend(step, *chunk_of(step, 0, length), gates)
    start = 0
    for size in (31, 33, 64, 896, 1000, 13, 2011, 952):
        batch, tokens = chunk_of(step, start, start + size)
        for one, other in zip(attend(step, batch, tokens, gates), whole, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other[tokens])
        start += size
    assert start == length


def test_a_million_tokens_of_context_fit_a_bounded_scratch() -> None:
    new, layout = 2048, (4, 2, 64, 64)
    step = prefill_step(layout, [1 << 20], [new])
    batch, gates = step.batch, random_gates(*step.q.shape[:2])
    unbounded = 2 * 4 * new * layout[1] * (1 << 20) // NSA.page
    assert unbounded > 1.9 * SCRATCH_BYTES
    gathered = (1 << 20) // NSA.compress_stride * layout[1] * (64 + 64) * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, selection = compressed_attention(step.q, step.compressed, batch, nsa=NSA)
    fused = sparse_attention(step.q, step.kv, selection, out, gates, batch, nsa=NSA)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= SCRATCH_BYTES + gathered + 8 * step.q.nbytes + (16 << 20)
    last = slice(new - 16, new)
    batch = replace(
        batch,
        positions=batch.positions[last],
        token_rows=batch.token_rows[last],
        cu_seqlens_q=torch.tensor([0, 16], dtype=torch.int32, device="cuda"),
        max_query_len=16,
    )
    part = Step(step.q[last], step.k[last], step.v[last], step.kv, step.compressed, batch)
    chosen = selection[last]
    assert_selection(part, chosen)
    wanted, _ = reference.compressed_attention(part.q, part.compressed, batch, nsa=NSA)
    assert out is not None
    assert_near(out[last], wanted)
    arguments = (part.q, part.kv, chosen, out[last], gates[last], batch)
    assert_near(fused[last], reference.sparse_attention(*arguments, nsa=NSA))


def test_pages_and_entries_beyond_two_to_the_31_elements_are_found() -> None:
    layout, context, new = (16, 4, 128, 128), 2300, 300
    step = prefill_step(layout, [context], [new])
    batch, gates = step.batch, random_gates(*step.q.shape[:2])
    slots, blocks = 70_000, 1_050_000  # 2.3e9 and 2.15e9 elements a pool

    def moved(pool: Tensor, count: int) -> Tensor:
        far = torch.empty(count, *pool.shape[1:], dtype=pool.dtype, device="cuda")
        far[count - pool.shape[0] :] = pool
        return far

    def shifted(table: Tensor, by: int) -> Tensor:
        return torch.where(table >= 0, table + by, table)

    kv = PagedKV(moved(step.kv.k, slots), moved(step.kv.v, slots))
    compressed = CompressedKV(moved(step.compressed.k, blocks), moved(step.compressed.v, blocks))
    far = replace(
        batch,
        slot_table=shifted(batch.slot_table, slots - step.kv.k.shape[0]),
        block_table=shifted(batch.block_table, blocks - step.compressed.k.shape[0]),
    )
    tokens = slice(None)
    near = attend(step, batch, tokens, gates)
    moved_step = replace(step, kv=kv, compressed=compressed)
    for one, other in zip(attend(moved_step, far, tokens, gates), near, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
