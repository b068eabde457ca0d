"""Log-probabilities of prompts, made as their chunks are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..schedule.plan import PromptLogprobs, RowStart, ScheduledChunk
from .inputs import TokenSpan
from .sampler import LogprobTensors


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Tokens of a chunk whose logits predict the prompt's tokens ``targets``."""

    request_id: str
    span: TokenSpan
    start: int  # position of the first target
    targets: list[int]
    num_alternatives: int


class PromptRows:
    """Rows whose requests asked for their prompt's log-probabilities."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[list[int], int]] = {}  # row: (prompt, alternatives)

    def start(self, start: RowStart) -> None:
        """A request takes a row. One that has sampled before has had its prompt's entries."""
        self.free(start.row)
        wanted = start.sampling.prompt_logprobs
        if wanted is not None and not start.output_token_ids:
            self._prompts[start.row] = (start.prompt_token_ids, wanted)

    def free(self, row: int) -> None:
        self._prompts.pop(row, None)

    def spans(self, chunks: Sequence[ScheduledChunk]) -> list[PromptSpan]:
        """What the step's chunks predict of such prompts; a prompt's first token has no past."""
        if not self._prompts:
            return []
        spans = (self._span(at, chunk) for at, chunk in enumerate(chunks))
        return [span for span in spans if span is not None]

    def _span(self, at: int, chunk: ScheduledChunk) -> PromptSpan | None:
        if chunk.row not in self._prompts:
            return None
        prompt, wanted = self._prompts[chunk.row]
        targets = prompt[chunk.start + 1 : chunk.start + 1 + chunk.num_tokens]
        if not targets:
            return None
        span = TokenSpan(at, 0, len(targets))
        return PromptSpan(chunk.request_id, span, chunk.start + 1, targets, wanted)


def prompt_entries(
    spans: Sequence[PromptSpan], tensors: LogprobTensors | None
) -> list[PromptLogprobs]:
    """The spans' records, from the tensors of all their targets in order."""
    if tensors is None:
        return []
    counts = [span.num_alternatives for span in spans for _ in span.targets]
    entries = iter(tensors.entries(counts))
    return [
        PromptLogprobs(span.request_id, span.start, [next(entries) for _ in span.targets])
        for span in spans
    ]
