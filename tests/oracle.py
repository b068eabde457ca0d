"""NSA as the paper states it (arXiv 2502.11089, section 3), for one sequence, in fp64.

It is written to be read, with a loop per token, head and block, and shares nothing with the code
under test: plain numbers and contiguous tensors, no pages, no batches, no imports of ours.
Queries q [t, Hq, Dk] stand at the given positions of a sequence with keys k [T, Hkv, Dk] and
values v [T, Hkv, Dv]; outputs are [t, Hq, Dv].
Sizes: l compression length, d its stride, P the selection block, n selected blocks, w the window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One query [Dk] over keys [L, Dk]: (output [Dv], softmax [L]). No keys: an output of 0."""
    scores = (k.double() @ q.double()) / math.sqrt(q.shape[0])
    p = scores.softmax(0)
    return p @ v.double(), p


def dense(q: Tensor, k: Tensor, v: Tensor, positions: list[int]) -> Tensor:
    """Causal attention."""
    return window(q, k, v, positions, w=len(k))


def window(q: Tensor, k: Tensor, v: Tensor, positions: list[int], *, w: int) -> Tensor:
    """Attention over tokens max(0, t − w + 1) … t."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for row, t in enumerate(positions):
        first = max(0, t - w + 1)
        for head in range(q.shape[1]):
            kv_head = head // group
            keys, values = k[first : t + 1, kv_head], v[first : t + 1, kv_head]
            out[row, head] = attend(q[row, head], keys, values)[0]
    return out


def num_entries(tokens: int, *, l: int, d: int) -> int:  # noqa: E741
    """Compressed entries that lie wholly within the first ``tokens`` tokens."""
    return 0 if tokens < l else 1 + math.floor((tokens - l) / d)


def compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: list[int],
    *,
    l: int,  # noqa: E741
    d: int,
) -> tuple[Tensor, list[Tensor]]:
    """Attention over entries [C, Hkv, D]: output, and each query's softmax [Hq, visible]."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    shares = []
    for row, t in enumerate(positions):
        visible = num_entries(t + 1, l=l, d=d)
        share = torch.zeros(q.shape[1], visible, dtype=torch.float64)
        for head in range(q.shape[1]):
            kv_head = head // group
            keys, values = k[:visible, kv_head], v[:visible, kv_head]
            if visible:
                out[row, head], share[head] = attend(q[row, head], keys, values)
        shares.append(share)
    return out, shares


def overlap_weight(entry: int, block: int, *, l: int, d: int, page: int) -> int:  # noqa: E741
    """Strides of d tokens of the entry that lie in the block."""
    return sum((entry * d + k * d) // page == block for k in range(l // d))


def scores(share: Tensor, t: int, *, num_kv_heads: int, l: int, d: int, page: int) -> Tensor:  # noqa: E741
    """Importance [Hkv, t//P + 1] of the candidate blocks of token t from its softmax [Hq, c]."""
    group = share.shape[0] // num_kv_heads
    result = torch.zeros(num_kv_heads, t // page + 1, dtype=torch.float64)
    for kv_head in range(num_kv_heads):
        together = share[kv_head * group : (kv_head + 1) * group].sum(0)
        for entry in range(share.shape[1]):
            for block in range(entry * d // page, min(t, entry * d + l - 1) // page + 1):
                weight = overlap_weight(entry, block, l=l, d=d, page=page)
                result[kv_head, block] += weight * together[entry]
    return result


def forced_blocks(t: int, *, page: int, initial: int, local: int) -> set[int]:
    """The first and last blocks of those up to token t, which are always selected."""
    blocks = list(range(t // page + 1))
    return set(blocks[:initial]) | set(blocks[-local:])


def select(score: Tensor, t: int, *, page: int, n: int, initial: int, local: int) -> list[int]:
    """Forced blocks, then the highest scores [t//P + 1], the smaller index on a tie; ascending."""
    forced = forced_blocks(t, page=page, initial=initial, local=local)
    order = sorted(range(len(score)), key=lambda j: (j not in forced, -float(score[j]), j))
    return sorted(order[:n])


def check_selection(
    chosen: list[int],
    score: Tensor,
    t: int,
    *,
    page: int,
    n: int,
    initial: int,
    local: int,
    tolerance: float,
) -> None:
    """Assert that a padded selection is right but for choices between nearly equal scores."""
    size = min(n, t // page + 1)
    blocks = chosen[:size]
    forced = forced_blocks(t, page=page, initial=initial, local=local)
    assert chosen[size:] == [-1] * (n - size), f"token {t}: {chosen} is not padded to {size} blocks"
    assert blocks == sorted(set(blocks)), f"token {t}: {chosen} is not ascending"
    assert all(0 <= j <= t // page for j in blocks), f"token {t}: {chosen} has other blocks"
    assert forced <= set(blocks), f"token {t}: {chosen} lacks some of {forced}"
    free = [float(score[j]) for j in set(blocks) - forced]
    left = [float(score[j]) for j in set(range(t // page + 1)) - set(blocks)]
    if free and left:
        assert min(free) >= max(left) - tolerance, f"token {t}: {min(free)} over {max(left)}"


def selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: list[int],
    selection: list[list[list[int]]],
    *,
    page: int,
) -> Tensor:
    """Attention over the tokens up to t of each query's and KV head's blocks (−1: none)."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for row, t in enumerate(positions):
        for head in range(q.shape[1]):
            kv_head = head // group
            blocks = [j for j in selection[row][kv_head] if j >= 0]
            tokens = [s for j in blocks for s in range(j * page, (j + 1) * page) if s <= t]
            out[row, head] = attend(q[row, head], k[tokens, kv_head], v[tokens, kv_head])[0]
    return out


def gated(branches: list[Tensor], gate_logits: Tensor) -> Tensor:
    """Σ_c sigmoid(g^c) · o^c for branches [T, Hq, Dv] and logits [T, Hq, 3]."""
    gates = gate_logits.double().sigmoid()
    return sum(gates[..., c, None] * branch for c, branch in enumerate(branches))


def rotate(x: Tensor, position: int, inv_freq: Tensor, scale: float = 1.0) -> Tensor:
    """Rotary embedding of ``x`` [..., D] at one position, pair (j, j + Dr/2) by its own angle."""
    half = len(inv_freq)
    out = x.double().clone()
    for j in range(half):
        angle = position * float(inv_freq[j])
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        out[..., j] = x[..., j] * cos - x[..., j + half] * sin
        out[..., j + half] = x[..., j] * sin + x[..., j + half] * cos
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def phi(
    kind: str,
    tokens: Tensor,
    kv_head: int,
    *,
    position: Tensor | None = None,
    weight: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """One entry [D] from its tokens [l, D] of one KV head (paper, equation 7)."""
    x = tokens.double()
    if position is not None:
        x = x + position[kv_head].double()
    if kind == "mean":
        return x.sum(0) / len(x)
    if kind == "weighted":
        return sum(weight[kv_head, s].double() * x[s] for s in range(len(x)))
    flat = torch.cat(list(x))  # [l·D], token by token
    if kind == "mlp":
        return silu(flat @ down.double()) @ up.double()
    if down is not None:
        return x.sum(0) / len(x) + flat @ down[kv_head].double() @ up[kv_head].double()
    matrix = weight[kv_head] if weight.ndim == 3 else weight
    return flat @ matrix.double()


def entries(
    tokens: Tensor,
    kind: str,
    *,
    l: int,  # noqa: E741
    d: int,
    inv_freq: Tensor | None = None,
    scale: float = 1.0,
    **parameters: Tensor | None,
) -> Tensor:
    """Every entry [C, Hkv, D] of a sequence [T, Hkv, D] of keys or values.

    With ``inv_freq``, ``tokens`` are not rotated yet; each entry is, at its first token's position.
    """
    count = num_entries(len(tokens), l=l, d=d)
    out = torch.zeros(count, *tokens.shape[1:], dtype=torch.float64)
    for i in range(count):
        for kv_head in range(tokens.shape[1]):
            piece = tokens[i * d : i * d + l, kv_head]
            out[i, kv_head] = phi(kind, piece, kv_head, **parameters)
            if inv_freq is not None:
                out[i, kv_head] = rotate(out[i, kv_head], i * d, inv_freq, scale)
    return out


def nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: list[int],
    gate_logits: Tensor,
    *,
    l: int,  # noqa: E741
    d: int,
    page: int,
    n: int,
    w: int,
    initial: int = 1,
    local: int = 2,
) -> Tensor:
    """The whole of it with φ = mean."""
    k_entries, v_entries = entries(k, "mean", l=l, d=d), entries(v, "mean", l=l, d=d)
    out_compressed, shares = compressed(q, k_entries, v_entries, positions, l=l, d=d)
    selection = []
    for t, share in zip(positions, shares, strict=True):
        rows = scores(share, t, num_kv_heads=k.shape[1], l=l, d=d, page=page)
        selection.append(
            [select(row, t, page=page, n=n, initial=initial, local=local) for row in rows]
        )
    out_selected = selected(q, k, v, positions, selection, page=page)
    out_window = window(q, k, v, positions, w=w)
    return gated([out_compressed, out_selected, out_window], gate_logits)
