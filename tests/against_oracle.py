"""Outputs and selections of a ragged step against the oracle's, for each branch and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import oracle
from tests.strategies import Ragged

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def assert_rows(out: Tensor, case: Ragged, expected: list[Tensor]) -> None:
    assert out.dtype == case.q.dtype
    assert torch.equal(out[case.num_real :], torch.zeros_like(out[case.num_real :]))
    atol = TOLERANCE[case.q.dtype]
    for (_, tokens, _), want in zip(case.parts(), expected, strict=True):
        torch.testing.assert_close(out[tokens].double(), want, atol=atol, rtol=atol)


def assert_selection(selection: Tensor, case: Ragged, shares: list[list[Tensor]]) -> None:
    nsa, sizes = case.nsa, {"page": case.nsa.page}
    assert bool((selection[case.num_real :] == -1).all())
    forced = {"initial": nsa.num_initial, "local": nsa.num_local}
    lengths = {"l": nsa.compress_len, "d": nsa.compress_stride}
    for (_, tokens, at), row in zip(case.parts(), shares, strict=True):
        for chosen, share, t in zip(selection[tokens].tolist(), row, at, strict=True):
            score = oracle.scores(share, t, num_kv_heads=case.heads.num_kv, **lengths, **sizes)
            for head, blocks in enumerate(chosen):
                oracle.check_selection(
                    blocks, score[head], t, n=nsa.num_selected, tolerance=1e-4, **forced, **sizes
                )


def assert_compressed(out: Tensor | None, selection: Tensor, case: Ragged) -> None:
    """Output of the compressed branch and the selection by its scores."""
    assert out is not None
    sizes = {"l": case.nsa.compress_len, "d": case.nsa.compress_stride}
    wanted = [
        oracle.compressed(case.q[s], case.entries_k[r], case.entries_v[r], at, **sizes)
        for r, s, at in case.parts()
    ]
    assert_rows(out, case, [one for one, _ in wanted])
    assert_selection(selection, case, [shares for _, shares in wanted])


def random_selection(case: Ragged) -> Tensor:
    """The current block of each token and others at random."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch.num_tokens, case.heads.num_kv, case.nsa.num_selected)
    selection = torch.full(shape, -1, dtype=torch.int32)
    for token, position in enumerate(case.batch.positions.tolist()):
        current = position // case.nsa.page
        for head in range(case.heads.num_kv if position >= 0 else 0):
            others = torch.randperm(current, generator=generator)[: shape[2] - 1].tolist()
            blocks = sorted([*others, current])
            selection[token, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return selection


def selected_of(case: Ragged, selection: Tensor) -> list[Tensor]:
    chosen = selection.tolist()
    return [
        oracle.selected(case.q[s], case.k[r], case.v[r], at, chosen[s], page=case.nsa.page)
        for r, s, at in case.parts()
    ]


def window_of(case: Ragged) -> list[Tensor]:
    return [
        oracle.window(case.q[s], case.k[r], case.v[r], at, w=case.nsa.window)
        for r, s, at in case.parts()
    ]


def gated_sum_of(
    case: Ragged, selection: Tensor, out_compressed: Tensor, gates: Tensor
) -> list[Tensor]:
    branches = zip(case.parts(), selected_of(case, selection), window_of(case), strict=True)
    return [
        oracle.gated([out_compressed[s].double(), chosen, near], gates[s])
        for (_, s, _), chosen, near in branches
    ]
