"""Decode kernels and cache writes: the oracle's numbers in the interpreter, the twins' on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nsa_serve.kernels import gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.gpu import decode_compressed
from nsa_serve.kernels.gpu.compressed_attention import compressed_attention
from nsa_serve.kernels.gpu.context_splits import max_splits, split_size
from nsa_serve.kernels.gpu.decode_compressed import TILES, decode_compressed_attention
from nsa_serve.kernels.gpu.dense_attention import dense_attention
from nsa_serve.kernels.gpu.gated_fusion import sparse_attention
from nsa_serve.kernels.gpu.kv_write import kv_write
from nsa_serve.kernels.shapes import CompressedKV, Compressor, NSAShape, PagedKV, StepBatch
from tests.against_oracle import assert_compressed, assert_rows, gated_sum_of, random_selection
from tests.gpu_steps import SMALL, Step, make_step
from tests.kernel_runs import LAYOUTS, interpreted
from tests.paged import Heads
from tests.strategies import SHAPES, Ragged, make_ragged
from tests.test_reference_writes import make_compressor

CASES = [
    (Heads(num_q=6, num_kv=2, dim_k=16, dim_v=8), SHAPES[3], torch.float32),
    (Heads(num_q=16, num_kv=1, dim_k=24, dim_v=16), SHAPES[4], torch.float16),
    (Heads(num_q=4, num_kv=1, dim_k=16, dim_v=32), SHAPES[0], torch.float32),
]


def decode_step(heads: Heads, nsa: NSAShape, dtype: torch.dtype, seed: int = 0) -> Ragged:
    """One to three new tokens a row at and beside borders, a first token, padding."""
    borders = [nsa.dense_len, nsa.dense_len + 1, nsa.page + 1, nsa.compress_len]
    lengths = [(length, 1 + at % 3) for at, length in enumerate(borders)]
    return make_ragged(heads, nsa, [*lengths, (1, 1)], seed, dtype=dtype, pad_tokens=1, pad_rows=1)


@interpreted
@pytest.mark.parametrize(("heads", "nsa", "dtype"), CASES)
def test_decode_scores_and_selection_are_the_oracles(
    heads: Heads, nsa: NSAShape, dtype: torch.dtype
) -> None:
    case = decode_step(heads, nsa, dtype)
    out, selection = compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    assert_compressed(out, selection, case)


@interpreted
@pytest.mark.parametrize(("heads", "nsa", "dtype"), CASES)
def test_decode_sums_the_oracles_branches_by_gates_of_any_stride(
    heads: Heads, nsa: NSAShape, dtype: torch.dtype
) -> None:
    case = decode_step(heads, nsa, dtype)
    selection, tokens = random_selection(case), case.batch.num_tokens
    fused = torch.randn(tokens, 5 + 3 * heads.num_q).to(dtype)
    gates = fused[:, 5:].view(tokens, heads.num_q, 3)
    out_compressed = torch.randn(tokens, heads.num_q, heads.dim_v).to(dtype)
    out_compressed[case.num_real :] = 0
    out = sparse_attention(case.q, case.kv, selection, out_compressed, gates, case.batch, nsa=nsa)
    assert_rows(out, case, gated_sum_of(case, selection, out_compressed, gates))


def short_step(heads: Heads, nsa: NSAShape, dtype: torch.dtype, seed: int = 0) -> Ragged:
    """One new token a row, contexts at and beside borders, padding; few entries in all of them."""
    borders = [nsa.compress_len, nsa.compress_len - 1, nsa.page, nsa.dense_len, nsa.dense_len + 1]
    longest = 60 * nsa.compress_stride
    lengths = [(length, 1) for length in (1, *borders, nsa.dense_len + nsa.page + 1, longest)]
    return make_ragged(heads, nsa, lengths, seed, dtype=dtype, pad_tokens=2, pad_rows=1)


@interpreted
@pytest.mark.parametrize(("heads", "nsa", "dtype"), CASES)
def test_short_contexts_are_the_oracles_in_one_launch(
    heads: Heads, nsa: NSAShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = short_step(heads, nsa, dtype)
    monkeypatch.setattr(decode_compressed, "attend_splits", None)
    out, selection = compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    assert_compressed(out, selection, case)


@interpreted
def test_one_launch_or_three_select_the_same_blocks() -> None:
    case = short_step(*CASES[0])
    arguments = (case.q, case.compressed, case.batch)
    one = decode_compressed_attention(*arguments, nsa=case.nsa)
    three = decode_compressed_attention(
        *arguments, nsa=case.nsa, tiles=replace(TILES, short_entries=0)
    )
    assert one[0] is not None
    torch.testing.assert_close(one[0], three[0])
    assert torch.equal(one[1], three[1])
    none, alone = decode_compressed_attention(*arguments, nsa=case.nsa, with_output=False)
    assert none is None
    assert torch.equal(alone, one[1])


@interpreted
def test_blocks_of_equal_scores_are_taken_from_the_first_on() -> None:
    contexts = [SMALL.dense_len + 3 * SMALL.page]
    step = make_step(contexts, [1], SMALL, seed=1)
    compressed = CompressedKV(torch.zeros_like(step.compressed.k), step.compressed.v.nan_to_num())
    _, selection = decode_compressed_attention(step.q, compressed, step.batch, nsa=SMALL)
    last = (contexts[0] - 1) // SMALL.page
    assert selection.tolist() == [[[0, 1, last - 1, last]] * 2]


def assert_unfinite_scores_stay_in_their_lists(bad: str, device: str) -> None:
    contexts = [SMALL.dense_len + 3 * SMALL.page, 20]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    step = make_step(contexts, [1, 1], SMALL, seed=1, device=device, dtype=dtype)
    q, compressed = step.q.clone(), CompressedKV(step.compressed.k.clone(), step.compressed.v)
    if bad == "query":
        q[0] = torch.nan
    else:
        compressed.k[step.batch.block_table[0, 2], :, 1, 0] = -torch.inf
    _, selection = decode_compressed_attention(q, compressed, step.batch, nsa=SMALL)
    for found in selection[0].tolist():
        assert found == sorted(set(found))
        assert {0, 5, 6} < set(found) <= set(range(7))
    assert selection[1].tolist() == [[0, 1, -1, -1]] * 2


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", ["query", "key"])
def test_scores_that_are_no_numbers_select_n_blocks_and_leave_others_alone(bad: str) -> None:
    assert_unfinite_scores_stay_in_their_lists(bad, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bad", ["query", "key"])
def test_scores_that_are_no_numbers_select_n_blocks_on_the_gpu(bad: str) -> None:
    assert_unfinite_scores_stay_in_their_lists(bad, "cuda")


@interpreted
def test_a_smaller_scratch_decodes_to_the_same_bytes() -> None:
    case = decode_step(*CASES[0])
    whole = compressed_attention(case.q, case.compressed, case.batch, nsa=case.nsa)
    tiles = replace(TILES, scratch_bytes=1, programs=1, select_blocks=16)
    passes = decode_compressed_attention(
        case.q, case.compressed, case.batch, nsa=case.nsa, tiles=tiles
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, passes, strict=True))


@interpreted
@pytest.mark.parametrize("ops", [reference, gpu], ids=["torch", "triton"])
def test_ranked_blocks_are_a_wider_selection_beside_the_same_one(ops: ModuleType) -> None:
    heads, nsa, dtype = CASES[2]
    case = decode_step(heads, nsa, dtype)
    wide = replace(nsa, num_selected=nsa.num_selected + 3)
    ranked = torch.full((case.batch.num_tokens, heads.num_kv, wide.num_selected), 7).int()
    plain = ops.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    found = ops.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa, ranked=ranked)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    _, wanted = ops.compressed_attention(case.q, case.compressed, case.batch, nsa=wide)
    assert torch.equal(ranked, wanted)


@interpreted
def test_ranked_blocks_do_not_depend_on_the_scratch() -> None:
    step = make_step([200, 60], [1, 1])
    ranked = [torch.empty(2, 2, 6, dtype=torch.int32) for _ in range(2)]
    for tiles, room in zip((TILES, replace(TILES, select_blocks=8)), ranked, strict=True):
        decode_compressed_attention(
            step.q, step.compressed, step.batch, nsa=SMALL, tiles=tiles, ranked=room
        )
    assert torch.equal(*ranked)


@interpreted
def test_blocks_are_ranked_in_short_steps_alone() -> None:
    step = make_step([100], [60])
    ranked = torch.empty(60, 2, 6, dtype=torch.int32)
    for ops in (reference, gpu):
        with pytest.raises(ContractError, match="in short steps alone"):
            ops.compressed_attention(step.q, step.compressed, step.batch, nsa=SMALL, ranked=ranked)


def test_no_context_has_more_splits_than_the_grid_allows_for() -> None:
    for longest in (1, 100, 5000, 70_000):
        most = max_splits(longest, 128, 16)
        found = max(-(-n // split_size(n, 128, 16)) for n in range(1, longest + 1))
        assert most == found


@interpreted
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear-low-rank", "mlp"])
@pytest.mark.parametrize("new", [1, 23])
def test_written_tokens_and_entries_are_the_references(kind: str, new: int) -> None:
    nsa = SHAPES[3]
    compressor = make_compressor(kind, nsa, position=True, rope=kind in ("mean", "weighted"))
    step = make_step(
        [nsa.compress_len, 47, 2 * nsa.page], [1, new, min(new, 5)], nsa, dk=12, dv=8, padding=1
    )
    assert_writes_alike(step, nsa, compressor, atol=1e-5)


def assert_writes_alike(step: Step, nsa: NSAShape, compressor: Compressor, *, atol: float) -> None:
    """The kernel and the reference leave the same pools, untouched poison included."""
    pools = []
    for write in (kv_write, reference.kv_write):
        kv = PagedKV(step.kv.k.clone(), step.kv.v.clone())
        compressed = CompressedKV(step.compressed.k.clone(), step.compressed.v.clone())
        write(step.k, step.v, kv, compressed, step.batch, nsa=nsa, compressor=compressor)
        pools.append((kv, compressed))
    (kv, compressed), (kv_wanted, compressed_wanted) = pools
    exact = {"atol": 0, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(kv.k, kv_wanted.k, **exact)
    torch.testing.assert_close(kv.v, kv_wanted.v, **exact)
    near = {"atol": atol, "rtol": atol, "equal_nan": True}
    torch.testing.assert_close(compressed.k, compressed_wanted.k, **near)
    torch.testing.assert_close(compressed.v, compressed_wanted.v, **near)


NSA = NSAShape()
BORDERS = [1, 31, 32, 33, 47, 48, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 1600, 2049, 4097]


def gpu_step(layout: tuple[int, int, int, int], rows: int, *, queries: int = 1) -> Step:
    hq, hkv, dk, dv = layout
    contexts = [BORDERS[(5 * row + 17) % len(BORDERS)] for row in range(rows)]
    new = [min(queries, context) for context in contexts]
    return make_step(
        contexts, new, NSA, hq=hq, hkv=hkv, dk=dk, dv=dv, dtype=torch.bfloat16, device="cuda"
    )


def strided_gates(tokens: int, hq: int) -> Tensor:
    gen = torch.Generator("cuda").manual_seed(3)
    fused = torch.randn(tokens, 8 + 3 * hq, device="cuda", generator=gen).bfloat16()
    return fused[:, 8:].view(tokens, hq, 3)


def assert_near(out: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (7, 4), (256, 1)])
def test_decode_on_the_gpu_is_the_reference(
    layout: tuple[int, int, int, int], rows: int, queries: int
) -> None:
    step = gpu_step(layout, rows, queries=queries)
    out, selection = compressed_attention(step.q, step.compressed, step.batch, nsa=NSA)
    wanted, chosen = reference.compressed_attention(step.q, step.compressed, step.batch, nsa=NSA)
    assert out is not None
    assert_near(out, wanted)
    # Rounding may swap nearly equal blocks, in few places.
    assert (selection != chosen).any(-1).float().mean() < 0.02
    gates = strided_gates(len(step.q), layout[0])
    arguments = (step.q, step.kv, chosen, wanted, gates, step.batch)
    assert_near(
        sparse_attention(*arguments, nsa=NSA), reference.sparse_attention(*arguments, nsa=NSA)
    )
    assert_near(
        dense_attention(step.q, step.kv, step.batch),
        reference.dense_attention(step.q, step.kv, step.batch),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("rows", [1, 130])
def test_one_launch_or_three_agree_on_the_gpu(layout: tuple[int, int, int, int], rows: int) -> None:
    hq, hkv, dk, dv = layout
    contexts = [(1023, 1024, 1025, 1090, 1600, 2048, 31, 32, 48)[row % 9] for row in range(rows)]
    step = make_step(
        contexts, [1] * rows, NSA, hq=hq, hkv=hkv, dk=dk, dv=dv, dtype=torch.bfloat16,
        device="cuda", padding=1,
    )  # fmt: skip
    arguments = (step.q, step.compressed, step.batch)
    one, chosen = decode_compressed_attention(*arguments, nsa=NSA)
    tiles = replace(TILES, short_entries=0)
    three, wanted = decode_compressed_attention(*arguments, nsa=NSA, tiles=tiles)
    assert one is not None
    assert three is not None
    assert_near(one, three)
    assert (chosen != wanted).any(-1).float().mean() < 0.02
    written = chosen[:-1]
    assert (written.diff(dim=-1) > 0)[written[..., 1:] >= 0].all()
    assert (chosen[-1] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "queries"), [(256, 1), (3, 40)])
def test_writes_on_the_gpu_are_the_reference(rows: int, queries: int) -> None:
    step = gpu_step(LAYOUTS[0], rows, queries=queries)
    assert_writes_alike(step, NSA, Compressor(), atol=1e-2)


def attend_all(step: Step, batch: StepBatch, gates: Tensor) -> list[Tensor]:
    """Every output of a layer's decode, NSA's and dense."""
    out, selection = compressed_attention(step.q, step.compressed, batch, nsa=NSA)
    fused = sparse_attention(step.q, step.kv, selection, out, gates, batch, nsa=NSA)
    assert out is not None
    return [out, selection, fused, dense_attention(step.q, step.kv, batch)]


@pytest.mark.gpu
def test_a_row_has_the_same_bytes_alone_and_batched() -> None:
    # Rows enough that programs divide the work otherwise than for one.
    step = gpu_step(LAYOUTS[0], 130)
    batch = replace(step.batch, max_context_len=65536)
    gates = strided_gates(len(step.q), step.q.shape[1])
    together = attend_all(step, batch, gates)
    for row in (0, 5, 17, 129):
        own = slice(row, row + 1)
        alone = replace(
            batch,
            positions=batch.positions[own],
            token_rows=torch.zeros_like(batch.token_rows[own]),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
            context_lens=batch.context_lens[own],
            block_table=batch.block_table[own],
            slot_table=batch.slot_table[own],
        )
        single = attend_all(replace(step, q=step.q[own]), alone, gates[own])
        assert all(torch.equal(x, y[own]) for x, y in zip(single, together, strict=True))


@pytest.mark.gpu
def test_a_captured_step_serves_other_contexts() -> None:
    step = gpu_step(LAYOUTS[0], 18)
    width = 65536 // NSA.page
    wide = torch.full((18, width), -1, dtype=torch.int32, device="cuda")
    tables = {name: wide.clone() for name in ("block_table", "slot_table")}
    for name, table in tables.items():
        given = getattr(step.batch, name)
        table[:, : given.shape[1]] = given
    batch = replace(step.batch, max_context_len=65536, **tables)
    gates = strided_gates(len(step.q), step.q.shape[1])
    outputs, replay = captured(lambda: attend_all(step, batch, gates))
    contexts = step.batch.context_lens.clone()
    for shift in (0, 1, 40, 700):
        batch.context_lens.copy_((contexts - shift).clamp(min=0))
        batch.positions.copy_(batch.context_lens.long() - 1)
        replay()
        for one, other in zip(outputs, attend_all(step, batch, gates), strict=True):
            assert torch.equal(one, other)
            assert not one.isnan().any()


def captured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_elements_are_found() -> None:
    slots, hq, hkv, dim = 70_000, 16, 4, 128  # 2.3e9 elements a pool
    k, v = (
        torch.empty(slots, hkv, NSA.page, dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    )
    context, last = 2000, slots - 1
    table = (last - torch.arange(32, device="cuda")).int()[None]
    for pool in (k, v):
        pool[last - 31 :] = torch.randn(32, hkv, NSA.page, dim, device="cuda").bfloat16()
    batch = StepBatch(
        positions=torch.tensor([context - 1], device="cuda"),
        token_rows=torch.zeros(1, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor([context], dtype=torch.int32, device="cuda"),
        block_table=table,
        slot_table=table,
        max_query_len=1,
        max_context_len=context,
    )
    near = replace(batch, slot_table=(31 - torch.arange(32, device="cuda")).int()[None])
    far, low = PagedKV(k, v), PagedKV(k[last - 31 :].clone(), v[last - 31 :].clone())
    q = torch.randn(1, hq, dim, device="cuda").bfloat16()
    selection = torch.arange(16, dtype=torch.int32, device="cuda").expand(1, hkv, 16).contiguous()
    gates = torch.randn(1, hq, 3, device="cuda")
    for kv, where in ((far, batch), (low, near)):
        new = torch.ones(1, hkv, dim, device="cuda").bfloat16()
        kv_write(new, new, kv, None, where, nsa=NSA, compressor=Compressor())
    assert torch.equal(dense_attention(q, far, batch), dense_attention(q, low, near))
    outputs = [
        sparse_attention(q, kv, selection, None, gates, where, nsa=NSA)
        for kv, where in ((far, batch), (low, near))
    ]
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_a_context_of_a_million_tokens_decodes_as_the_reference() -> None:
    step = make_step(
        [1 << 20, 3], [1, 1], NSA, hq=4, hkv=1, dk=64, dv=64, dtype=torch.bfloat16, device="cuda"
    )
    out, selection = compressed_attention(step.q, step.compressed, step.batch, nsa=NSA)
    wanted, chosen = reference.compressed_attention(step.q, step.compressed, step.batch, nsa=NSA)
    assert out is not None
    assert_near(out, wanted)
    assert (selection != chosen).float().mean() < 0.2
    assert_near(
        dense_attention(step.q, step.kv, step.batch),
        reference.dense_attention(step.q, step.kv, step.batch),
    )
