"""The row-wise ops, dense attention, sampling and fixed products in Triton against their twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_serve.kernels import gpu, reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.gpu.dense_decode import TILES, attend_short_rows
from nsa_serve.kernels.gpu.varlen_prefill import attend_varlen, find_xformers
from nsa_serve.kernels.shapes import NSAShape
from tests import oracle
from tests.against_oracle import assert_rows
from tests.gpu_steps import make_step
from tests.kernel_runs import interpreted
from tests.paged import Heads
from tests.strategies import SHAPES, Ragged, make_ragged
from tests.test_sampling import settings_of

# (device, type, rows, width)
SMALL = [
    ("cpu", torch.float32, 5, 40),
    ("cpu", torch.float16, 3, 576),
    ("cpu", torch.float16, 0, 8),
]
LARGE = [
    pytest.param("cuda", torch.bfloat16, rows, width, marks=pytest.mark.gpu)
    for rows, width in ((1, 4096), (256, 576), (70_000, 2048), (33, 8192))
]
# A GPU's own machine runs the large ones alone.
SIZES = [pytest.param(*size, marks=interpreted) for size in SMALL] + LARGE


def normal(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_every_op_of_the_reference_has_a_gpu_twin() -> None:
    assert gpu.__all__ == reference.__all__


@pytest.mark.parametrize(("device", "dtype", "rows", "width"), SIZES)
def test_norms_are_the_references_on_rows_of_any_stride(
    device: str, dtype: torch.dtype, rows: int, width: int
) -> None:
    x = normal(rows, width + 24, device=device, dtype=dtype)[:, :width]
    residual = normal(rows, width, device=device, dtype=dtype, seed=1)
    weight = normal(width, device=device, dtype=dtype, seed=2)
    torch.testing.assert_close(
        gpu.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5)
    )
    found = gpu.add_rms_norm(x, residual, weight, eps=1e-5)
    wanted = reference.add_rms_norm(x, residual, weight, eps=1e-5)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(("device", "dtype", "rows", "width"), SIZES)
def test_swiglu_is_the_references(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = normal(rows, 2 * width + 8, device=device, dtype=dtype)[:, : 2 * width]
    torch.testing.assert_close(gpu.swiglu(gate_up), reference.swiglu(gate_up))


# Hq, Hkv, Dk, Dv, Dr / 2
HEAD_SHAPES = [(6, 2, 16, 8, 8), (9, 3, 24, 24, 8), (3, 1, 64, 64, 32)]


@pytest.mark.parametrize("shape", HEAD_SHAPES)
@pytest.mark.parametrize("norms", ["none", "both", "keys"])
@pytest.mark.parametrize(
    ("device", "dtype", "rows"),
    [
        pytest.param("cpu", torch.float32, 4, marks=interpreted),
        pytest.param("cpu", torch.float16, 1, marks=interpreted),
        pytest.param("cuda", torch.bfloat16, 70_000, marks=pytest.mark.gpu),
    ],
)
def test_rotated_heads_are_the_references(
    shape: tuple[int, ...], norms: str, device: str, dtype: torch.dtype, rows: int
) -> None:
    hq, hkv, dk, dv, half = shape
    width = (hq + hkv) * dk + hkv * dv
    qkv = normal(rows, width + 16, device=device, dtype=dtype)[:, :width]
    cos, sin = normal(2, rows, half, device=device, dtype=torch.float32)
    settings = {
        "num_q_heads": hq,
        "num_kv_heads": hkv,
        "head_dim_k": dk,
        "head_dim_v": dv,
        "q_norm": normal(dk, device=device, dtype=dtype) if norms == "both" else None,
        "k_norm": None if norms == "none" else normal(dk, device=device, dtype=dtype, seed=1),
    }
    found = gpu.qkv_norm_rope(qkv, cos, sin, **settings)
    # A norm may round its last bit the other way, of which a rotation can leave more than itself.
    close = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1.6e-2}
    torch.testing.assert_close(found, reference.qkv_norm_rope(qkv, cos, sin, **settings), **close)


# Decodes alone, decodes and a prompt's chunk mixed, one prompt; a page that is no power of two.
DENSE = [
    (Heads(6, 2, 16, 8), SHAPES[3], [(40, 3), (17, 2), (300, 1), (9, 8), (1, 1)], torch.float32),
    (Heads(6, 2, 16, 8), SHAPES[3], [(40, 3), (90, 33), (300, 1), (9, 9)], torch.float16),
    (Heads(4, 1, 24, 16), SHAPES[0], [(140, 70)], torch.float32),
    (Heads(4, 4, 24, 16), NSAShape(8, 4, 24, 4, window=24), [(90, 40), (77, 1)], torch.float16),
]


def dense_of(case: Ragged) -> list[Tensor]:
    return [oracle.dense(case.q[s], case.k[r], case.v[r], at) for r, s, at in case.parts()]


@interpreted
@pytest.mark.parametrize(("heads", "nsa", "lengths", "dtype"), DENSE)
def test_dense_attention_is_the_oracles(
    heads: Heads, nsa: NSAShape, lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    case = make_ragged(heads, nsa, lengths, 3, dtype=dtype, pad_tokens=2, pad_rows=1)
    assert_rows(gpu.dense_attention(case.q, case.kv, case.batch), case, dense_of(case))


@interpreted
def test_a_decode_tokens_bytes_do_not_depend_on_a_prompt_in_the_step() -> None:
    heads, nsa = Heads(6, 2, 16, 8), SHAPES[3]
    mixed = make_ragged(heads, nsa, [(300, 1), (40, 20)], 5)
    alone = replace(
        mixed.batch,
        positions=mixed.batch.positions[:1],
        token_rows=mixed.batch.token_rows[:1],
        cu_seqlens_q=mixed.batch.cu_seqlens_q[:2],
        context_lens=mixed.batch.context_lens[:1],
        block_table=mixed.batch.block_table[:1],
        slot_table=mixed.batch.slot_table[:1],
        max_query_len=1,
    )
    together = gpu.dense_attention(mixed.q, mixed.kv, mixed.batch)
    assert torch.equal(gpu.dense_attention(mixed.q[:1], mixed.kv, alone), together[:1])


@interpreted
def test_rows_that_exceed_the_scratch_are_attended_in_passes() -> None:
    case = make_ragged(Heads(6, 2, 16, 8), SHAPES[3], [(300, 1), (40, 1), (9, 1)], 6, pad_tokens=1)
    tiles = replace(TILES, scratch_bytes=1, max_programs=1)
    out = case.q.new_empty(*case.q.shape[:2], 8)
    attend_short_rows(case.q, case.kv, case.batch, out, longest=1, tiles=tiles)
    assert torch.equal(out, gpu.dense_attention(case.q, case.kv, case.batch))


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    """What xformers answers, row by row."""
    outs, token, key = [], 0, 0
    for tokens, context in rows:
        own, keys = slice(token, token + tokens), slice(key, key + context)
        at = list(range(context - tokens, context))
        outs.append(oracle.dense(q[own], k[keys], v[keys], at).to(q.dtype))
        token, key = own.stop, keys.stop
    return torch.cat(outs)


@interpreted
def test_long_rows_reach_a_varlen_library_with_their_pages_gathered() -> None:
    lengths = [(40, 3), (17, 1), (50, 20)]
    case = make_ragged(Heads(6, 2, 16, 16), SHAPES[3], lengths, 3, pad_tokens=2)
    batch = replace(case.batch, row_lens=tuple((new, length) for length, new in lengths))
    out = torch.empty_like(case.q)
    attend_short_rows(case.q, case.kv, batch, out, longest=1)
    attend_varlen(case.q, case.kv, batch, out, attend_rows, shortest=2)
    assert_rows(out, case, dense_of(case))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [(64, 4, 128, 128), (9, 3, 64, 64), (16, 2, 192, 128)])
@pytest.mark.parametrize("known", [False, True])
def test_dense_prefill_on_the_gpu_is_the_reference(
    layout: tuple[int, int, int, int], known: bool
) -> None:
    hq, hkv, dk, dv = layout
    contexts, new = [700, 2049, 65, 1], [700, 300, 1, 1]
    step = make_step(
        contexts,
        new,
        NSAShape(),
        hq=hq,
        hkv=hkv,
        dk=dk,
        dv=dv,
        dtype=torch.bfloat16,
        device="cuda",
    )
    rows = tuple(zip(new, contexts, strict=True)) if known else None
    out = gpu.dense_attention(step.q, step.kv, replace(step.batch, row_lens=rows))
    wanted = reference.dense_attention(step.q, step.kv, step.batch)
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_the_choice_of_a_dense_prefill_is_made_once() -> None:
    assert find_xformers() is find_xformers()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "num_out", "num_in"), [(3, 70, 1100), (70, 130, 72), (0, 5, 8)])
def test_fixed_products_are_torchs(
    dtype: torch.dtype, rows: int, num_out: int, num_in: int
) -> None:
    x = normal(rows, num_in + 8, device="cpu", dtype=dtype)[:, :num_in]
    weight = normal(num_out, num_in, device="cpu", dtype=dtype, seed=1) / num_in**0.5
    bias = normal(num_out, device="cpu", dtype=dtype, seed=2)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3}[dtype]
    for added in (None, bias):
        wide = F.linear(x.float(), weight.float(), None if added is None else added.float())
        found = gpu.linear(x, weight, added)
        torch.testing.assert_close(found, wide.to(dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "num_out", "num_in"),
    [
        pytest.param("cpu", torch.float32, 513, 20, 1100, marks=interpreted),
        pytest.param("cuda", torch.bfloat16, 4096, 4096, 4096, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 4096, 576, 1536, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 1000, 49_152, 576, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, 1000, 1000, 11_008, marks=pytest.mark.gpu),
    ],
)
def test_a_rows_product_has_the_same_bytes_for_every_number_of_rows(
    device: str, dtype: torch.dtype, rows: int, num_out: int, num_in: int
) -> None:
    x = normal(rows, num_in, device=device, dtype=dtype)
    weight = normal(num_out, num_in, device=device, dtype=dtype, seed=1) / num_in**0.5
    whole = gpu.linear(x, weight)
    torch.testing.assert_close(whole, F.linear(x, weight), atol=2e-2, rtol=2e-2)
    for first, last in ((0, 1), (rows - 1, rows), (70, 75), (3, 131)):
        assert torch.equal(gpu.linear(x[first:last], weight), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_references_fixed_product_has_the_same_bytes_for_every_number_of_rows(
    dtype: torch.dtype,
) -> None:
    x, weight = (normal(rows, 200, device="cpu", dtype=dtype, seed=rows) for rows in (100, 300))
    whole = reference.linear(x, weight)
    torch.testing.assert_close(whole, F.linear(x, weight), atol=1e-2, rtol=1e-2)
    for first, last in ((0, 1), (31, 33), (64, 100), (99, 100)):
        assert torch.equal(reference.linear(x[first:last], weight), whole[first:last])


def test_a_product_of_two_types_is_refused() -> None:
    with pytest.raises(ContractError, match="width or type"):
        gpu.linear(torch.ones(1, 4), torch.ones(2, 4, dtype=torch.float16))


def awkward_logits(rows: int, vocabulary: int, device: str) -> Tensor:
    """Spread, with forbidden tokens, a row of many ties and one of equal values."""
    logits = 4 * normal(rows, vocabulary, device=device, dtype=torch.float32)
    logits[:, ::7] = -torch.inf
    logits[1] = (logits[1] * 2).round() / 2
    logits[2] = 1.5
    return logits


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "device"),
    [
        pytest.param(12, 5000, "cpu", marks=interpreted),
        pytest.param(256, 73_448, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_sampled_tokens_are_the_references(
    truncated: bool, rows: int, vocabulary: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(4)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator)

    limits = {
        "top_k": torch.where(uniform() < 0.6, (200 * uniform()).int(), 0),
        "top_p": torch.where(uniform() < 0.7, uniform(), 1.0),
        "min_p": torch.where(uniform() < 0.4, 0.3 * uniform(), 0.0),
    }
    settings = settings_of(
        rows,
        temperature=torch.where(uniform() < 0.2, 0.0, 0.5 + uniform()),
        steps=torch.arange(rows) * 7919,
        seeds=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        **(limits if truncated else {}),
    )
    columns = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps")
    settings = replace(settings, **{name: getattr(settings, name).to(device) for name in columns})
    logits = awkward_logits(rows, vocabulary, device)
    found, wanted = gpu.sample(logits, settings), reference.sample(logits, settings)
    # On a GPU exponentials and sums round otherwise: a token at the border may be kept or not.
    assert (found != wanted).sum() <= (rows // 100 if device == "cuda" else 0)


@interpreted
def test_a_row_without_a_finite_maximum_gives_some_token() -> None:
    logits = torch.stack([torch.full((9,), value) for value in (-torch.inf, torch.nan, torch.inf)])
    for limits in ({}, {"top_k": 3, "top_p": 0.5}):
        tokens = gpu.sample(logits, settings_of(3, **limits))
        assert bool(((tokens >= 0) & (tokens < 9)).all())
