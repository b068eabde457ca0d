"""Merged cache writes: every φ against the oracle, equal bytes however a prompt was chunked."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_serve.kernels import reference
from nsa_serve.kernels.contracts import ContractError
from nsa_serve.kernels.shapes import (
    CompressedKV,
    CompressKind,
    Compressor,
    NSAShape,
    PagedKV,
    Phi,
)
from tests import oracle
from tests.paged import (
    Heads,
    Tables,
    chunks_of,
    make_tables,
    poisoned_cache,
    read_entries,
    read_tokens,
    step_batch,
)
from tests.strategies import SHAPES, context_lengths

HEADS = Heads(num_q=2, num_kv=2, dim_k=12, dim_v=8)
KINDS = ["mean", "weighted", "linear", "linear-shared", "linear-low-rank", "mlp"]


def make_phi(kind: str, dim: int, nsa: NSAShape, seed: int, *, position: bool) -> Phi:
    generator = torch.Generator().manual_seed(seed)
    heads, flat = HEADS.num_kv, nsa.compress_len * dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-2] ** 0.5

    added = random(heads, nsa.compress_len, dim) if position else None
    match kind:
        case "mean":
            return Phi(CompressKind.MEAN, added)
        case "weighted":
            weight = torch.rand(heads, nsa.compress_len, generator=generator)
            return Phi(CompressKind.WEIGHTED, added, weight)
        case "linear":
            return Phi(CompressKind.LINEAR, added, random(heads, flat, dim))
        case "linear-shared":
            return Phi(CompressKind.LINEAR, added, random(flat, dim))
        case "linear-low-rank":
            down, up = random(heads, flat, 3), random(heads, 3, dim)
            return Phi(CompressKind.LINEAR, added, down=down, up=up)
    return Phi(CompressKind.MLP, added, down=random(flat, flat), up=random(flat, dim))


def make_compressor(kind: str, nsa: NSAShape, *, position: bool = False, rope: bool = False):
    inv_freq = 100.0 ** -torch.linspace(0, 0.8, 4) if rope else None  # rotates 8 of 12
    return Compressor(
        make_phi(kind, HEADS.dim_k, nsa, 1, position=position),
        make_phi(kind, HEADS.dim_v, nsa, 2, position=position),
        inv_freq,
        rope_scale=1.25 if rope else 1.0,
    )


def sequence(length: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(length, HEADS.num_kv, HEADS.dim_k, generator=generator)
    v = torch.randn(length, HEADS.num_kv, HEADS.dim_v, generator=generator)
    return k.to(dtype), v.to(dtype)


def entries_of(tokens: Tensor, phi: Phi, nsa: NSAShape, **rope: object) -> Tensor:
    parameters = {name: getattr(phi, name) for name in ("position", "weight", "down", "up")}
    sizes = {"l": nsa.compress_len, "d": nsa.compress_stride}
    return oracle.entries(tokens, str(phi.kind), **sizes, **parameters, **rope)


Cache = tuple[PagedKV, CompressedKV]


def write(
    requests: Sequence[tuple[Tensor, Tensor]],
    steps: Sequence[Sequence[tuple[int, int, int]]],
    tables: Tables,
    compressor: Compressor,
    dtype: torch.dtype = torch.float32,
    *,
    pad_tokens: int = 0,
) -> Cache:
    """Empty, poisoned pools after steps of chunks (request, start, count)."""
    kv, compressed = poisoned_cache(tables, HEADS, dtype)
    for chunks in steps:
        batch = step_batch(tables, chunks, pad_tokens=pad_tokens, pad_rows=pad_tokens)
        k, v = (
            torch.cat([requests[row][part][start : start + count] for row, start, count in chunks])
            for part in (0, 1)
        )
        junk = [tensor.new_full((pad_tokens, *tensor.shape[1:]), 7.0) for tensor in (k, v)]
        reference.kv_write(
            torch.cat([k, junk[0]]),
            torch.cat([v, junk[1]]),
            kv,
            compressed,
            batch,
            nsa=tables.nsa,
            compressor=compressor,
        )
    return kv, compressed


def assert_same_bytes(one: Cache, other: Cache) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("k", "v"):
            x, y = getattr(a, name).contiguous(), getattr(b, name).contiguous()
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name


def written(cache: PagedKV | CompressedKV) -> int:
    return int((~cache.k.isnan()).all(-1).sum())


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nsa", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=["32-16", "16-16", "8-4"])
def test_every_phi_gives_the_oracles_entries(nsa: NSAShape, kind: str, position: bool) -> None:
    compressor, tables = make_compressor(kind, nsa, position=position), make_tables([100], nsa, 3)
    k, v = sequence(100, 4)
    kv, compressed = write([(k, v)], [[(0, 0, 100)]], tables, compressor)
    want = [entries_of(k, compressor.k, nsa), entries_of(v, compressor.v, nsa)]
    found = read_entries(compressed, tables, 0, len(want[0]))
    torch.testing.assert_close(found.double(), torch.cat(want, -1), atol=2e-5, rtol=2e-5)
    assert torch.equal(read_tokens(kv, tables, 0, 100), torch.cat([k, v], -1))


@pytest.mark.parametrize("kind", ["mean", "linear"])
def test_keys_compressed_before_rope_are_rotated_at_their_first_token(kind: str) -> None:
    nsa = SHAPES[0]
    compressor = make_compressor(kind, nsa, position=True, rope=True)
    raw, v = sequence(150, 6)
    rope = {"inv_freq": compressor.inv_freq, "scale": compressor.rope_scale}
    turned = [oracle.rotate(raw[t], t, **rope) for t in range(150)]
    tables = make_tables([150], nsa, 3)
    k = torch.stack(turned).float()
    _, compressed = write(
        [(k, v)], [[(0, 0, 100), (0, 100, 50)][:1], [(0, 100, 50)]], tables, compressor
    )
    want = [entries_of(raw, compressor.k, nsa, **rope), entries_of(v, compressor.v, nsa)]
    found = read_entries(compressed, tables, 0, len(want[0]))
    torch.testing.assert_close(found.double(), torch.cat(want, -1), atol=5e-5, rtol=5e-5)


@settings(max_examples=25)
@given(
    st.data(),
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS[:5]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_cache_bytes_do_not_depend_on_chunking(
    data: st.DataObject, nsa: NSAShape, kind: str, rope: bool, dtype: torch.dtype
) -> None:
    length = data.draw(context_lengths(nsa, 260))
    cut = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    compressor = make_compressor(kind, nsa, position=True, rope=rope)
    tables, request = make_tables([length], nsa, 3), sequence(length, length)
    whole = write([request], [[(0, 0, length)]], tables, compressor, dtype)
    steps = [[(0, start, count)] for start, count in chunks_of(length, cut)]
    parts = write([request], steps, tables, compressor, dtype, pad_tokens=2)
    assert_same_bytes(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_decode_leaves_the_bytes_of_one_prefill(kind: str) -> None:
    nsa = SHAPES[3]
    compressor, tables = make_compressor(kind, nsa, position=True), make_tables([90], nsa, 5)
    request = sequence(90, 5)
    whole = write([request], [[(0, 0, 90)]], tables, compressor)
    steps = [[(0, start, count)] for start, count in chunks_of(90, [50, 1])]
    assert_same_bytes(whole, write([request], steps, tables, compressor))


def test_rows_of_a_step_do_not_touch_each_other() -> None:
    nsa, lengths = SHAPES[0], [130, 70, 33]
    compressor, tables = make_compressor("linear", nsa), make_tables(lengths, nsa, 8)
    requests = [sequence(length, length) for length in lengths]
    alone = write(
        requests, [[(row, 0, length)] for row, length in enumerate(lengths)], tables, compressor
    )
    steps = [
        [(0, 0, 64), (1, 0, 31)],
        [(1, 31, 1), (0, 64, 47), (2, 0, 33)],
        [(1, 32, 38), (0, 111, 19)],
    ]
    assert_same_bytes(alone, write(requests, steps, tables, compressor, pad_tokens=3))


@pytest.mark.parametrize("length", [1, 31, 32, 47, 48, 63, 64, 65, 128])
def test_nothing_is_written_beyond_tokens_and_complete_entries(length: int) -> None:
    nsa = SHAPES[0]
    tables = make_tables([length], nsa, 8)
    kv, compressed = write(
        [sequence(length, 1)], [[(0, 0, length)]], tables, Compressor(), pad_tokens=4
    )
    assert written(kv) == length * HEADS.num_kv
    assert written(compressed) == nsa.num_visible(length - 1) * HEADS.num_kv


def test_a_truncated_page_is_rewritten_to_the_bytes_of_a_fresh_one() -> None:
    nsa = SHAPES[0]
    compressor, tables = make_compressor("mean", nsa), make_tables([128], nsa, 8)
    k, v = sequence(128, 1)
    wrong = (torch.cat([k[:90], -k[90:]]), torch.cat([v[:90], -v[90:]]))
    rolled_back = write([wrong, (k, v)], [[(0, 0, 128)]], tables, compressor)
    batch = step_batch(tables, [(0, 90, 38)])
    reference.kv_write(k[90:], v[90:], *rolled_back, batch, nsa=nsa, compressor=compressor)
    assert_same_bytes(write([(k, v)], [[(0, 0, 128)]], tables, compressor), rolled_back)


def test_a_dense_model_writes_tokens_alone() -> None:
    nsa = SHAPES[0]
    tables = make_tables([70], nsa, 8)
    kv, _ = poisoned_cache(tables, HEADS)
    k, v = sequence(70, 1)
    batch = step_batch(tables, [(0, 0, 70)], pad_tokens=1)
    pad = torch.zeros(1, HEADS.num_kv, 1)
    reference.kv_write(
        torch.cat([k, pad.expand(-1, -1, HEADS.dim_k)]),
        torch.cat([v, pad.expand(-1, -1, HEADS.dim_v)]),
        kv, None, batch, nsa=nsa, compressor=Compressor(),
    )  # fmt: skip
    assert torch.equal(read_tokens(kv, tables, 0, 70), torch.cat([k, v], -1))


def test_a_phi_without_its_weight_is_refused() -> None:
    tokens = torch.zeros(1, HEADS.num_kv, 32, 4)
    broken = Compressor(k=replace(Phi(), kind=CompressKind.LINEAR))
    with pytest.raises(ContractError, match="kind linear lacks a weight"):
        reference.compress(tokens, tokens, first_positions=torch.tensor([0]), compressor=broken)
