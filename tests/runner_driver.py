"""Runs plans without a scheduler: the test says which row computes how many tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.step import StepInputs
from nsa_serve.request import SamplingParams
from nsa_serve.runner.model_runner import ModelRunner, PendingStep
from nsa_serve.schedule.plan import RowStart, ScheduledChunk, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Row:
    """A request as the driver sees it."""

    prompt: list[int]
    output: list[int]
    computed: int
    blocks: list[int]
    in_flight: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


@dataclass
class Recorder:
    """A model that keeps what it was asked and what it answered."""

    model: object
    inputs: list[StepInputs] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)  # logits

    def hidden(self, step):
        self.inputs.append(step)
        return self.model.hidden(step)

    def logits(self, hidden):
        logits = self.model.logits(hidden)
        self.steps.append(logits.clone())
        return logits


class BigramModel:
    """Logits are a fixed function of the token alone: row ``token`` of ``table`` [V, V]."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @classmethod
    def random(cls, vocab_size: int, *, seed: int = 0, scale: float = 2.0) -> BigramModel:
        gen = torch.Generator().manual_seed(seed)
        return cls(torch.randn(vocab_size, vocab_size, generator=gen) * scale)

    def hidden(self, step):
        return step.token_ids.unsqueeze(1)

    def logits(self, hidden):
        return self.table[hidden[:, 0]]


class Driver:
    """Rows, blocks and chunks for one runner. Blocks are handed out in a scattered order."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.rows: dict[int, Row] = {}
        num_blocks = runner.pool.num_blocks
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self._started: list[RowStart] = []
        self._freed: list[int] = []
        self._step = 0
        self.masks: dict[int, bytes] = {}  # by row: the tokens that its next sample may be

    def add(
        self, row, prompt, sampling=GREEDY, *, seed=0, output=(), hits=(), computed=None
    ) -> None:
        """A request takes ``row``; ``hits`` are blocks of its first pages, computed already."""
        page = self.runner.pool.layout.page
        done = len(hits) * page if computed is None else computed
        self.rows[row] = Row(list(prompt), list(output), done, list(hits))
        start = RowStart(row, f"r{row}", sampling, seed, list(prompt), list(output), list(hits))
        self._started.append(start)

    def end(self, row, *, keep_blocks=False) -> Row:
        """A request leaves its row."""
        gone = self.rows.pop(row)
        self._freed.append(row)
        if not keep_blocks:
            self.free.extend(gone.blocks)
        return gone

    def launch(self, counts: dict[int, int]) -> PendingStep:
        """Queue a step in which each row computes that many tokens."""
        chunks = [self._chunk(row, count) for row, count in counts.items()]
        plan = StepPlan(self._step, self._freed, self._started, chunks)
        self._step += 1
        self._started, self._freed = [], []
        return self.runner.launch(plan)

    def apply(self, pending: PendingStep) -> StepResult:
        """Take a step's tokens in."""
        result = pending.result()
        for token in result.tokens:
            row = self.rows[int(token.request_id[1:])]
            row.output.append(token.token_id)
            row.in_flight -= 1
        return result

    def step(self, counts: dict[int, int]) -> StepResult:
        return self.apply(self.launch(counts))

    def finish_prompt(self, row: int, *splits: int) -> StepResult:
        """Compute what is left of a row's tokens, in chunks of ``splits`` and the rest."""
        for split in splits:
            self.step({row: split})
        left = self.rows[row]
        return self.step({row: len(left.tokens) - left.computed})

    def generate(self, rows, num_tokens: int) -> None:
        """Decode ``num_tokens`` more tokens of each of ``rows`` together."""
        for _ in range(num_tokens):
            self.step(dict.fromkeys(rows, 1))

    def _chunk(self, at: int, count: int) -> ScheduledChunk:
        row = self.rows[at]
        first, last = row.computed, row.computed + count
        pages = self.runner.pool.layout.num_pages(last)
        new = [self.free.pop() for _ in range(pages - len(row.blocks))]
        row.blocks.extend(new)
        row.computed = last
        total = len(row.tokens) + row.in_flight
        assert last <= total, "more tokens than the request has"
        samples = last == total
        known = row.tokens[first:last]
        row.in_flight += samples
        mask = self.masks.get(at) if samples else None
        return ScheduledChunk(at, f"r{at}", first, count, known, new, samples, mask)


def build_driver(
    model,
    layout: KVLayout,
    *,
    vocab_size: int,
    num_blocks: int = 64,
    max_rows: int = 8,
    max_tokens: int = 512,
    max_model_len: int = 512,
    eos_token_ids=(),
    device: str = "cpu",
    use_graphs: bool = False,
) -> Driver:
    """A driver over poisoned pools."""
    pool = DevicePool(layout, num_blocks, num_blocks, device)
    pool.poison()
    runner = ModelRunner(
        # Copies of logits within a capture would be the graph's own memory, over and over.
        model if use_graphs else Recorder(model),
        pool,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        use_graphs=use_graphs,
    )
    return Driver(runner)
