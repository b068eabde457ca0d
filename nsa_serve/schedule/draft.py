"""A step that is being put together: rows that start, chunks, and what is left of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ..request import Request
from .plan import RowStart, ScheduledChunk


@dataclass(slots=True)
class Draft:
    """Becomes a ``StepPlan`` once the budget is handed out."""

    step_id: int
    left: int  # tokens of the budget
    chunks: list[ScheduledChunk] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)  # of the chunks
    started: list[RowStart] = field(default_factory=list)
    starved: bool = False  # the blocks don't suffice for those that run
    share: int = 0  # tokens kept for long prompts while there are any

    def spare(self, longs: Sequence[Request]) -> int:
        """Tokens left for short prompts."""
        return self.left - self.share if longs else self.left

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
