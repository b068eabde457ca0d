"""What a step does and what came of it: plain values, the same bytes for every rank."""

from __future__ import annotations

import msgspec

from ..cache.residence import BlockMove as BlockMove
from ..cache.residence import ResidenceUpdate as ResidenceUpdate
from ..cache.shelf import PageAt as PageAt
from ..request import SamplingParams, TokenLogprob, TokenTrace
from ..stats import DiskReport as DiskReport
from ..stats import StreamReport as StreamReport
from ..stats import TierReport as TierReport


class RowStart(msgspec.Struct, frozen=True):
    """A request takes a row of the runner's tables: first admission, or resume after preemption."""

    row: int
    request_id: str
    sampling: SamplingParams
    seed: int  # the request's own, or one drawn for it; kept over preemptions
    prompt_token_ids: list[int]  # penalties count the prompt's tokens too
    output_token_ids: list[int]  # tokens it had sampled before it was preempted
    block_ids: list[int]  # blocks it holds already: prefix hits


class ScheduledChunk(msgspec.Struct, frozen=True):
    """The tokens of one request that a step computes: a prefill chunk or a decode."""

    row: int
    request_id: str
    start: int  # position of the first token
    num_tokens: int
    token_ids: list[int]  # the known ones; where shorter than num_tokens, the rest is on the device
    new_block_ids: list[int]  # appended to the row's block table before the step
    samples: bool  # the chunk reaches the request's last token, so a next token is sampled
    mask: bytes | None = None  # bits of the tokens that may be sampled; None: all


class StepPlan(msgspec.Struct, frozen=True):
    """One step: rows that end, rows that start, then the chunks to compute, in batch order."""

    step_id: int
    freed_rows: list[int]
    started: list[RowStart]
    chunks: list[ScheduledChunk]
    departing: list[PageAt] = []  # to be saved before anything else is done
    residence: ResidenceUpdate | None = None  # moves of pages before the step; None: no host tier
    arriving: list[PageAt] = []  # to be loaded after those moves

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class SampledToken(msgspec.Struct, frozen=True):
    """What one sampling chunk gave. With ``error`` set the token is void and the request fails."""

    request_id: str
    token_id: int
    logprob: TokenLogprob | None = None  # only if asked for
    error: str | None = None
    trace: TokenTrace | None = None  # only if asked for


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of prompt tokens [start, start + len(entries)) given their past."""

    request_id: str
    start: int
    entries: list[TokenLogprob]


class StepResult(msgspec.Struct, frozen=True):
    step_id: int
    tokens: list[SampledToken]  # one for each chunk that samples, in the plan's order
    prompt_logprobs: list[PromptLogprobs] = []
    tier: TierReport | None = None  # None: no host tier
    stream: StreamReport | None = None  # None: all weights are on the device
    disk: DiskReport | None = None  # None: no disk tier
    lost_block_ids: list[int] = []  # their pages could not be copied, and what was read is void
