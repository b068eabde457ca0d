"""A step that is being put together: rows that start, chunks, and what is left of the budget.

How a step's tokens are shared is said here. Each request that decodes gets one. A prompt is *long*
while it lacks more than a quarter of the budget. Long prompts that are alone get whole steps. As
soon as anybody else uses the step, long ones get a quarter of the budget together and the
short ones the rest of it; what the short ones leave is not used. And nothing is planned behind
a whole step: who comes while it runs gets into the next one.

So a short prompt, wherever in a long one's prefill it comes, waits for one whole chunk and is
computed in the step after, and requests that decode beside a long prompt get a token each
quarter chunk. Of the long prompts' part the first in the order gets at least half, and the one
that lacks least the other half: it need not wait for all of one that is far longer.

Where nobody waits for single tokens (``interactive`` is false) no prompt is long: each takes, in
the order, what is left of the budget, so that no step is smaller than it could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ..request import Request
from .plan import RowStart, ScheduledChunk


def long_share(budget: int) -> int:
    """Tokens of a step that long prompts get together beside others, of a budget in tokens."""
    return max(1, budget // 4)


@dataclass(slots=True)
class Draft:
    """Becomes a ``StepPlan`` once the budget is handed out."""

    step_id: int
    budget: int  # tokens
    interactive: bool = True
    left: int = field(init=False)  # tokens of the budget
    kept: int = 0  # of them for long prompts
    chunks: list[ScheduledChunk] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)  # of the chunks
    started: list[RowStart] = field(default_factory=list)
    starved: bool = False  # the blocks don't suffice for those that run
    is_whole: bool = False  # long prompts have it for themselves

    def __post_init__(self) -> None:
        self.left = self.budget

    @property
    def spare(self) -> int:
        """Tokens for short prompts."""
        return self.left - self.kept

    def is_long(self, request: Request) -> bool:
        lacking = request.num_tokens - request.num_computed
        return self.interactive and lacking > long_share(self.budget)

    def keep_for_long(self, *, is_first: bool) -> None:
        """There are long prompts. Of a last token, the first of all prompts in the order has it."""
        self.kept = min((self.left + is_first) // 2, long_share(self.budget))

    def share_among_long(self, *, alone: bool) -> int:
        """Tokens for all long prompts; to be asked when everybody else has got theirs."""
        self.is_whole = alone and not self.chunks
        return self.left if self.is_whole else min(self.left, long_share(self.budget))

    def start_row(self, request: Request, row: int, block_ids: Sequence[int]) -> None:
        """The request's first chunk since it runs is about to follow; it holds these blocks."""
        self.started.append(
            RowStart(
                row=row,
                request_id=request.request_id,
                sampling=request.sampling,
                seed=_seed(request),
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=list(request.output_token_ids),
                block_ids=list(block_ids),
            )
        )

    def place(self, request: Request, num_tokens: int, new_block_ids: list[int]) -> None:
        """The next tokens of a request; if they reach its last one, a token will be in flight."""
        row = request.row
        assert row is not None
        start = request.num_computed
        stop = start + num_tokens
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        samples = stop == known + request.num_in_flight
        token_ids = request.token_ids(start, min(stop, known)) if start < known else []
        assert not (samples and request.awaits_mask), "a token is sampled without its mask"
        self.chunks.append(
            ScheduledChunk(
                row,
                request.request_id,
                start,
                num_tokens,
                token_ids,
                new_block_ids,
                samples,
                mask=request.mask if samples else None,
            )
        )
        self.requests.append(request)
        self.left -= num_tokens
        request.num_computed = stop
        request.num_in_flight += samples
        request.last_step = self.step_id


def _seed(request: Request) -> int:
    """Its own, or one drawn from its id: the same after a preemption."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    digest = blake2b(request.request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
