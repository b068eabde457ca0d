"""Sampling of next tokens: penalties, bias, truncation, reproducible noise and log-probabilities.

What is kept is defined by values alone, never by the order of a sort, so that every
implementation keeps the same tokens: ``top_k`` keeps a token if fewer than k are strictly
likelier; ``top_p``, over the probabilities renormalised by ``top_k``, if those strictly likelier
weigh less than p together; ``min_p`` if its probability is at least min_p times the highest.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..contracts import check
from ..shapes import SamplingTensors

Tensor = torch.Tensor

# On the CPU a partial sort of this many tokens nearly always contains all that truncation keeps.
_CANDIDATES = 256
# Weyl increment (2^32 / golden ratio): a second, unrelated stream from the same words.
_GOLDEN = 0x9E3779B9 - (1 << 32)


def sample(logits: Tensor, settings: SamplingTensors) -> Tensor:
    """One token for each row of ``logits`` [B, V] fp32 -> [B] int64.

    Temperature 0 takes the likeliest token, the smallest id on a tie. Otherwise the token is the
    argmax of temperature-scaled logits plus Gumbel noise, over the tokens that truncation keeps.
    Rows without a finite maximum give some id in [0, V).
    """
    check(logits.ndim == 2, "logits have rows and a vocabulary", logits=logits)
    check(len(settings.temperature) == len(logits), "one setting a row", B=len(logits))
    greedy = logits.argmax(-1)  # [B]
    if settings.all_greedy:
        return greedy
    hot = settings.temperature > 0  # [B]
    divisor = torch.where(hot, settings.temperature, 1.0).unsqueeze(1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / divisor  # [B, V], at most 0
    drawn = (
        _draw_truncated(scaled, settings) if settings.any_truncation else _draw(scaled, settings)
    )
    return torch.where(hot, drawn, greedy)


def gumbel_noise(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise [B, K] fp32, a pure function of seed [B], step [B] and token id [B or 1, K].

    32-bit integer hashing (the rounds of lowbias32), wrapping: the same bits on every device.
    """
    first, second = _noise_keys(seeds, steps)
    token_ids = token_ids.to(torch.int32)
    if token_ids.is_cuda:
        return _gumbel(token_ids + first.unsqueeze(1), second.unsqueeze(1))
    # Row by row: a row's passes then run within the CPU's cache.
    noise = torch.empty(len(first), token_ids.shape[1])
    for row, ids, a, b in zip(noise, token_ids.expand_as(noise), first, second, strict=True):
        row.copy_(_gumbel(ids + a, b))
    return noise


def _noise_keys(seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Two words [B] int32 of seed and step, which enter the hash of each token id."""
    low, high, step = seeds.to(torch.int32), (seeds >> 32).to(torch.int32), steps.to(torch.int32)
    # Both words in one batch of small operations.
    offset = torch.arange(2, dtype=torch.int32, device=seeds.device).unsqueeze(1) * _GOLDEN
    high_first = torch.stack((high, low)) + offset
    low_next = torch.stack((low, high)) + offset
    first, second = _mix((step + offset) ^ _mix(low_next ^ _mix(high_first)))
    return first, second


def _gumbel(bits: Tensor, key: Tensor) -> Tensor:
    """Gumbel noise from ``bits`` int32, which are overwritten."""
    bits = _mix(bits, key)
    # 23 bits and a half: never 0 nor, after rounding to fp32, 1.
    uniform = _shift(bits, 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor, key: Tensor | None = None) -> Tensor:
    """A 32-bit permutation of ``x`` int32, in place; ``key`` enters between its two products."""
    x.bitwise_xor_(_shift(x, 16)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift(x, 15))
    if key is not None:
        x.bitwise_xor_(key)
    x.mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_(_shift(x, 16))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _draw(scaled: Tensor, settings: SamplingTensors) -> Tensor:
    """Gumbel-max over all tokens of ``scaled`` [B, V]."""
    token_ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    noise = gumbel_noise(settings.seeds, settings.steps, token_ids.unsqueeze(0))
    return noise.add_(scaled).argmax(-1)


def _draw_truncated(scaled: Tensor, settings: SamplingTensors) -> Tensor:
    if scaled.is_cuda:
        return _draw_kept(scaled, settings)
    width = min(scaled.shape[1], max(_CANDIDATES, int(settings.top_k.max())))
    values, token_ids = scaled.topk(width)  # [B, K]
    floor = _floor(values, scaled, settings)
    noise = gumbel_noise(settings.seeds, settings.steps, token_ids)
    best = noise.add_(values).masked_fill_(values < floor, -torch.inf).argmax(-1, keepdim=True)
    tokens = token_ids.gather(1, best)[:, 0]
    # Kept tokens may go on behind the candidates: those rows are drawn from the whole vocabulary.
    deep = (values[:, -1] >= floor[:, 0]) & (settings.temperature > 0)
    sorts = (settings.top_k > 0) | (settings.top_p < 1)
    for rows, draw in ((deep & sorts, _draw_kept), (deep & ~sorts, _draw_min_p)):
        index = rows.nonzero()[:, 0]
        if len(index):
            tokens[index] = draw(scaled[index], _select(settings, index))
    return tokens


def _draw_kept(scaled: Tensor, settings: SamplingTensors) -> Tensor:
    floor = _floor(scaled.sort(-1, descending=True).values, scaled, settings)
    return _draw(scaled.masked_fill(scaled < floor, -torch.inf), settings)


def _draw_min_p(scaled: Tensor, settings: SamplingTensors) -> Tensor:
    floor = settings.min_p.log().unsqueeze(1)
    return _draw(scaled.masked_fill(scaled < floor, -torch.inf), settings)


def _floor(values: Tensor, scaled: Tensor, settings: SamplingTensors) -> Tensor:
    """The least kept value [B, 1], from the largest ``values`` [B, K] of ``scaled``, descending."""
    limited = (settings.top_k > 0) & (settings.top_k < scaled.shape[1])
    last = (settings.top_k.long() - 1).clamp(0, values.shape[1] - 1).unsqueeze(1)
    kth = values.gather(1, last).masked_fill(~limited.unsqueeze(1), -torch.inf)  # [B, 1]
    total = _mass(scaled, kth)
    weights = values.double().exp().masked_fill_(values < kth, 0)
    before = weights.cumsum(-1) - weights  # mass ahead of each, [B, K]
    inside = (before < settings.top_p.double().unsqueeze(1) * total).sum(-1, keepdim=True)
    nucleus = values.gather(1, (inside - 1).clamp(min=0))
    nucleus = nucleus.masked_fill((settings.top_p >= 1).unsqueeze(1), -torch.inf)
    return torch.maximum(torch.maximum(kth, nucleus), settings.min_p.log().unsqueeze(1))


def _mass(scaled: Tensor, floor: Tensor) -> Tensor:
    """Σ exp of what is at least ``floor`` [B, 1] in each row of ``scaled`` [B, V]: [B, 1] fp64."""
    # Row by row: threads share out the sum of one row, but never a row of several.
    parts = [
        row.exp().masked_fill_(row < least, 0).sum(dtype=torch.float64)
        for row, least in zip(scaled, floor, strict=True)
    ]
    return torch.stack(parts).unsqueeze(1)


def _select(settings: SamplingTensors, rows: Tensor) -> SamplingTensors:
    return replace(
        settings,
        temperature=settings.temperature[rows],
        top_k=settings.top_k[rows],
        top_p=settings.top_p[rows],
        min_p=settings.min_p[rows],
        seeds=settings.seeds[rows],
        steps=settings.steps[rows],
    )


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    *,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """Logits [B, V] fp32 with penalties applied, as a new tensor.

    ``output_counts`` [B, V] int32 counts sampled tokens, ``in_prompt`` [B, V] bool marks the
    prompt's. ``repetition`` [B] divides positive logits of tokens seen in either and multiplies
    negative ones; ``frequency`` [B] is subtracted for each time, ``presence`` [B] once, over the
    sampled tokens alone.
    """
    check(
        logits.shape == output_counts.shape,
        "one count a logit",
        logits=logits,
        counts=output_counts,
    )
    sampled = output_counts > 0
    factor = torch.where(sampled | in_prompt, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits = logits - frequency.unsqueeze(1) * output_counts
    return logits - presence.unsqueeze(1) * sampled


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> Tensor:
    """Logits [B, V] with ``values`` [E] added at (``rows`` [E], ``token_ids`` [E]), a new tensor.

    −inf forbids a token.
    """
    return logits.index_put((rows, token_ids), values, accumulate=True)


def mask_logits(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits [B, V] fp32 with −inf where ``allowed`` has no bit, as a new tensor.

    ``allowed`` [B, ceil(V / 32)] int32: token i is bit i % 32, from the lowest, of word i // 32.
    """
    check(
        allowed.shape == (len(logits), -(-logits.shape[1] // 32)),
        "a bit for each logit",
        logits=logits,
        allowed=allowed,
    )
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = allowed.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts & 1  # [B, W, 8]
    kept = bits.flatten(1)[:, : logits.shape[1]].bool()
    return logits.masked_fill(~kept, -torch.inf)


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of ``logits`` [B, V] fp32 at ``tokens`` [B], and each row's ``top`` likeliest.

    Returns (logprob [B] fp32, rank [B] int64 from 1, top logprobs [B, top] fp32 in descending
    order, their ids [B, top] int64). The rank counts the strictly likelier tokens; of those that
    are as likely, the lowest ids come first.
    """
    # A sum by itself would run in another order in one row than in several.
    logprobs = logits.log_softmax(-1)
    at = tokens.unsqueeze(1)
    rank = (logits > logits.gather(1, at)).sum(-1) + 1
    token_ids = _likeliest(logits, min(top, logits.shape[1]))
    return logprobs.gather(1, at)[:, 0], rank, logprobs.gather(1, token_ids), token_ids


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids [B, count] int64 of the largest ``logits`` [B, V] fp32, and of equal ones the lowest.

    Which of the equal ones topk takes depends on how many it is asked for, and so on the other
    rows. Therefore no two are equal here: a number in the order of the values, above the id.
    """
    if not count:
        return logits.new_empty(len(logits), 0, dtype=torch.int64)
    bits = (logits + 0.0).view(torch.int32)  # the sum has no −0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys <<= 32
    keys -= torch.arange(logits.shape[1], device=logits.device)
    return -keys.topk(count).values & 0xFFFFFFFF
