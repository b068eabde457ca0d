"""Next tokens from logits, each row by its own request's settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.dispatch import ops_for
from ..kernels.shapes import SamplingTensors
from ..request import SamplingParams, TokenLogprob
from ..schedule.plan import RowStart, ScheduledChunk
from .bad_words import BadWords
from .penalties import PenaltyCounts, is_penalised
from .staging import Arrays, Tensors, to_device, to_host

# Below this, dividing by the temperature leaves one token; it is taken without noise.
GREEDY_TEMPERATURE = 1e-5
_MASK_TILE = 32


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of some tokens and of the likeliest in their place, on the host."""

    token_ids: torch.Tensor  # [R] int64
    logprobs: torch.Tensor  # [R] fp32
    ranks: torch.Tensor  # [R] int64
    top_logprobs: torch.Tensor  # [R, K] fp32
    top_ids: torch.Tensor  # [R, K] int64

    def entries(self, counts: Sequence[int]) -> list[TokenLogprob]:
        """One record a row, with ``counts[row]`` alternatives."""
        columns = zip(
            self.token_ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            counts,
            strict=True,
        )
        return [
            TokenLogprob(token, value, rank, list(zip(ids[:n], values[:n], strict=True)))
            for token, value, rank, ids, values, n in columns
        ]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled; the tensors are on the host, or on their way there."""

    tokens: torch.Tensor  # [B] int64; −1 where the logits had no finite maximum
    logprob_rows: list[int]  # samples that asked for log-probabilities
    logprob_counts: list[int]  # alternatives that each of them asked for
    logprobs: LogprobTensors | None


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """One request's changes to its logits: a bias, and tokens forbidden until ``min_tokens``."""

    bias_ids: list[int]
    bias_values: list[float]
    stop_ids: list[int]
    first_stop: int  # position from which a stop token may stand

    @classmethod
    def of(cls, start: RowStart, eos_token_ids: Sequence[int]) -> LogitEdits | None:
        """The edits that a request asks for; None if none."""
        sampling = start.sampling
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(eos_token_ids)
        # A grammar ends at an end token whatever the request asks: so that it goes on, none comes.
        never = eos_token_ids if sampling.ignore_eos and sampling.grammar is not None else ()
        if not sampling.logit_bias and not never and not (sampling.min_tokens and stops):
            return None
        return cls(
            bias_ids=[*sampling.logit_bias, *never],
            bias_values=[*sampling.logit_bias.values(), *(-np.inf for _ in never)],
            stop_ids=sorted(stops) if sampling.min_tokens else [],
            first_stop=len(start.prompt_token_ids) + sampling.min_tokens,
        )

    def at(self, position: int) -> tuple[list[int], list[float]]:
        """(token ids, values to add) for the token at ``position``."""
        if position >= self.first_stop:
            return self.bias_ids, self.bias_values
        forbidden = [-np.inf] * len(self.stop_ids)
        return self.bias_ids + self.stop_ids, self.bias_values + forbidden


class Sampler:
    """Sampling settings by row of the tables, and the sampling of a step's rows."""

    def __init__(
        self, vocab_size: int, *, max_rows: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        self.device = device
        self.eos_token_ids = tuple(eos_token_ids)
        self.ops = ops_for(device)
        self.penalties = PenaltyCounts(vocab_size, device)
        self.bad_words = BadWords(device)
        self._edits: dict[int, LogitEdits] = {}
        self._settings: dict[str, NDArray[Any]] = {
            "temperature": np.zeros(max_rows, np.float32),
            "top_p": np.ones(max_rows, np.float32),
            "min_p": np.zeros(max_rows, np.float32),
            "top_k": np.zeros(max_rows, np.int32),
            "seeds": np.zeros(max_rows, np.int64),
        }
        self._truncates = np.zeros(max_rows, bool)
        self._num_logprobs = np.full(max_rows, -1, np.int64)  # −1: none asked for

    def start(self, start: RowStart) -> None:
        """A request takes a row, whoever held it before."""
        self.free(start.row)
        sampling, row = start.sampling, start.row
        greedy = sampling.temperature < GREEDY_TEMPERATURE
        values = _Settings.greedy() if greedy else _Settings.of(sampling)
        self._settings["temperature"][row] = values.temperature
        self._settings["top_p"][row] = values.top_p
        self._settings["min_p"][row] = values.min_p
        self._settings["top_k"][row] = values.top_k
        self._settings["seeds"][row] = _signed(start.seed)
        self._truncates[row] = values.truncates
        self._num_logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        if is_penalised(sampling):
            self.penalties.add(start)
        if sampling.bad_words:
            self.bad_words.add(start)
        edits = LogitEdits.of(start, self.eos_token_ids)
        if edits is not None:
            self._edits[row] = edits

    def free(self, row: int) -> None:
        """Forget what a row held beside its settings, which the next start overwrites."""
        self.penalties.discard(row)
        self.bad_words.discard(row)
        self._edits.pop(row, None)

    def fill(self, host: Arrays, chunks: Sequence[ScheduledChunk]) -> None:
        """Write the settings of the step's samples, ``chunks``, into its arrays."""
        rows = np.array([chunk.row for chunk in chunks], np.int64)
        host["sample_rows"][:] = rows
        host["steps"][:] = [chunk.start + chunk.num_tokens for chunk in chunks]
        for name, values in self._settings.items():
            host[name][:] = values[rows]
        masks = [(at, chunk.mask) for at, chunk in enumerate(chunks) if chunk.mask is not None]
        for place, (at, mask) in enumerate(masks):
            host["mask_samples"][place] = at
            words = np.frombuffer(mask, np.int32)
            host["masks"][place * len(words) : (place + 1) * len(words)] = words

    def sample(
        self,
        logits: torch.Tensor,
        fields: Tensors,
        chunks: Sequence[ScheduledChunk],
        last_tokens: torch.Tensor,
    ) -> Sampled:
        """Sample a token for each of ``chunks`` from ``logits`` [B, V], fp32.

        Tokens go into ``last_tokens`` [rows] for the next step, and on their way to the host.
        """
        rows = [chunk.row for chunk in chunks]
        edited = self._edit(logits, chunks)
        penalised = any(row in self.penalties for row in rows)
        if penalised:
            edited = self.penalties.apply(edited, rows)
        warned = any(row in self.bad_words for row in rows)
        if warned:
            edited = self.bad_words.apply(edited, rows)
        if len(fields["mask_samples"]):
            edited = self._restrict(edited, logits, fields)
        tokens = self.ops.sample(edited, self._tensors(fields, rows))
        last_tokens.index_copy_(0, fields["sample_rows"], tokens)
        if penalised:
            self.penalties.record(tokens, rows)
        if warned:
            self.bad_words.record(tokens, rows)
        checked = torch.where(edited.amax(-1).isfinite(), tokens, -1)
        picks = [at for at, row in enumerate(rows) if self._num_logprobs[row] >= 0]
        counts = [int(self._num_logprobs[rows[at]]) for at in picks]
        logprobs = self._logprobs(logits, tokens, picks, counts)
        return Sampled(to_host(checked), picks, counts, logprobs)

    def _tensors(self, fields: Tensors, rows: list[int]) -> SamplingTensors:
        return SamplingTensors(
            temperature=fields["temperature"],
            top_k=fields["top_k"],
            top_p=fields["top_p"],
            min_p=fields["min_p"],
            seeds=fields["seeds"],
            steps=fields["steps"],
            all_greedy=not self._settings["temperature"][rows].any(),
            any_truncation=bool(self._truncates[rows].any()),
        )

    def _edit(self, logits: torch.Tensor, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        """``logits`` with biases added and early stops forbidden."""
        rows: list[int] = []
        token_ids: list[int] = []
        values: list[float] = []
        for at, chunk in enumerate(chunks):
            edits = self._edits.get(chunk.row)
            if edits is None:
                continue
            ids, added = edits.at(chunk.start + chunk.num_tokens)
            rows.extend([at] * len(ids))
            token_ids.extend(ids)
            values.extend(added)
        if not rows:
            return logits
        where, which = to_device(np.array([rows, token_ids], np.int64), self.device)
        amount = to_device(np.array(values, np.float32), self.device)
        edited: torch.Tensor = self.ops.add_bias(logits, where, which, amount)
        return edited

    def _restrict(
        self, edited: torch.Tensor, logits: torch.Tensor, fields: Tensors
    ) -> torch.Tensor:
        """Logits with what grammars forbid at −inf, as a new tensor.

        Where a request's own edits forbid all that its grammar allows, the grammar outranks them.
        """
        samples = fields["mask_samples"]
        masks = fields["masks"].view(len(samples), -1)
        restricted = edited.clone()
        # Some rows at a time: the bits of many, spread out, are as large as the logits.
        for first in range(0, len(samples), _MASK_TILE):
            at, allowed = samples[first : first + _MASK_TILE], masks[first : first + _MASK_TILE]
            own = self.ops.mask_logits(edited[at], allowed)
            if edited is not logits:
                plain = self.ops.mask_logits(logits[at], allowed)
                own = torch.where(own.amax(-1, keepdim=True) == -torch.inf, plain, own)
            restricted.index_copy_(0, at, own)
        return restricted

    def _logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, picks: list[int], counts: list[int]
    ) -> LogprobTensors | None:
        if not picks:
            return None
        if len(picks) < len(logits):
            index = to_device(np.array(picks, np.int64), self.device)
            logits, tokens = logits[index], tokens[index]
        return self.logprobs([(logits, tokens)], top=max(counts))

    def logprobs(
        self, tiles: Iterable[tuple[torch.Tensor, torch.Tensor]], *, top: int
    ) -> LogprobTensors:
        """Log-softmax of logits [R, V] at tokens [R], tile by tile, and its ``top`` values."""
        parts = [(tokens, *self.ops.token_logprobs(x, tokens, top=top)) for x, tokens in tiles]
        return LogprobTensors(*(to_host(torch.cat(column)) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What noise and truncation read of a request's settings."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, sampling: SamplingParams) -> _Settings:
        return cls(sampling.temperature, max(sampling.top_k, 0), sampling.top_p, sampling.min_p)

    @classmethod
    def greedy(cls) -> _Settings:
        return cls(0.0, 0, 1.0, 0.0)

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _signed(seed: int) -> int:
    """The 64 low bits of ``seed`` as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
