"""A worker without a model: every step takes the same time, and every answer is the same text.

All else is the real engine, so that what stands in front of it can be loaded and measured alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..config import EngineConfig
from ..models.checkpoint import resolve
from ..models.linear import choose_dtype
from ..request import TokenLogprob
from ..runner.worker import served_model, token_budget
from ..schedule.plan import (
    PromptLogprobs,
    RowStart,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    StepResult,
)
from ..tokenizer import Tokenizer, read_source

CACHE_TOKENS = 1 << 20  # nothing is stored, so that only the block tables cost memory
PAGE = 64  # tokens of a block where no selection prescribes it
TEXT = (
    " There is no model behind this answer. Its words are always the same, and they come at the "
    "pace that was asked for."
)
Clock = Callable[[], float]


class MockWorker:
    """Stands where ``Worker`` does, for ``--mock-engine``. Raises ``CheckpointError``."""

    def __init__(self, config: EngineConfig) -> None:
        rate = config.source.mock_token_rate
        assert rate is not None, "the configuration asks for a real model"
        checkpoint = resolve(config.source)
        self.device = torch.device("cpu")
        self.model_config = served_model(checkpoint, config)
        dtype = choose_dtype(config.source.dtype, self.device)
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.device_name = f"a mock of {rate:g} tokens/s"
        nsa = self.model_config.nsa
        self.page = PAGE if nsa is None else nsa.shape.page
        self.max_model_len = self.model_config.max_position
        self.num_blocks = max(CACHE_TOKENS, self.max_model_len) // self.page + 1
        self.token_budget = token_budget(config, self.device)
        self.tiers = None
        self.disk = None
        script = Tokenizer(read_source(checkpoint)).encode(TEXT, add_special=False)
        self._runner = MockRunner(script, 1 / rate)

    def launch(self, plan: StepPlan) -> PendingMock:
        """Begin a step; its ``result()`` waits until it is due."""
        return self._runner.launch(plan)

    def close(self) -> None:
        """Nothing outlasts the process."""


class MockRunner:
    """Gives token i of ``script``, over and over, as the i-th token of every answer.

    Steps are due at whole multiples of ``period`` seconds on the clock, so that whoever reads the
    same clock knows when a token was made. A step that is missed is not made up for.
    """

    def __init__(
        self,
        script: Sequence[int],
        period: float,
        *,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._script = script
        self._period = period
        self._clock = clock
        self._sleep = sleep
        self._last_step = 0  # number of the last period that a step was due at
        self._starts: dict[str, RowStart] = {}
        self._rows: dict[int, str] = {}

    def launch(self, plan: StepPlan) -> PendingMock:
        self._change_rows(plan)
        self._last_step = max(self._last_step, int(self._clock() / self._period)) + 1
        tokens = [self._token(chunk) for chunk in plan.chunks if chunk.samples]
        pieces = list(self._prompt_pieces(plan))
        result = StepResult(plan.step_id, tokens, pieces)
        return PendingMock(result, self._last_step * self._period, self._clock, self._sleep)

    def _change_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._starts.pop(self._rows.pop(row), None)
        for start in plan.started:
            self._rows[start.row] = start.request_id
            self._starts[start.request_id] = start

    def _token(self, chunk: ScheduledChunk) -> SampledToken:
        start = self._starts[chunk.request_id]
        at = chunk.start + chunk.num_tokens - len(start.prompt_token_ids)
        token_id = self._script[at % len(self._script)]
        wanted = start.sampling.logprobs
        logprob = None if wanted is None else _certain(token_id, wanted)
        return SampledToken(chunk.request_id, token_id, logprob)

    def _prompt_pieces(self, plan: StepPlan) -> Iterator[PromptLogprobs]:
        for chunk in plan.chunks:
            start = self._starts[chunk.request_id]
            wanted = start.sampling.prompt_logprobs
            first, stop = chunk.start + 1, chunk.start + chunk.num_tokens + 1
            targets = start.prompt_token_ids[first:stop]
            if wanted is not None and targets:
                entries = [_certain(token_id, wanted) for token_id in targets]
                yield PromptLogprobs(chunk.request_id, first, entries)


@dataclass(frozen=True, slots=True)
class PendingMock:
    """A step whose result is known, and held back until ``due`` on the clock."""

    outcome: StepResult
    due: float
    clock: Clock
    sleep: Callable[[float], None]

    def result(self) -> StepResult:
        self.sleep(max(0.0, self.due - self.clock()))
        return self.outcome


def _certain(token_id: int, num_top: int) -> TokenLogprob:
    """A token of probability 1, beside which there are no alternatives."""
    return TokenLogprob(token_id, 0.0, 1, [(token_id, 0.0)][:num_top])
