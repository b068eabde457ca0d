"""One step on one device: tables, forward pass, sampling. ``launch`` queues, ``result`` waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
import torch

from ..memory.device_pool import DevicePool
from ..memory.disk_tier import DiskTier
from ..memory.tier import HostTier
from ..models.step import StepInputs
from ..models.weight_stream import WeightStream
from ..request import TokenTrace
from ..schedule.plan import (
    DiskReport,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    StepResult,
    StreamReport,
)
from .graphs import GraphSet
from .inputs import StepBuffers, StepShape
from .prompt_logprobs import PromptRows, PromptSpan, prompt_entries
from .sampler import LogprobTensors, Sampled, Sampler
from .staging import StepSizes, Tensors, record_event, to_device, to_host
from .trace import StepTrace, TraceRows

# Logits of so many prompt tokens exist at a time: a chunk's would be gigabytes.
_LOGITS_TILE = 128
NO_FINITE_LOGITS = "the model gave no finite logits for this request"


class Model(Protocol):
    """What the runner asks of a model."""

    def hidden(self, step: StepInputs) -> torch.Tensor:
        """Hidden states [T, H] of every token of the step."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] fp32 of hidden states [R, H]."""


@dataclass(frozen=True, slots=True)
class StreamCount:
    """What has been streamed up to a step, once its tensors are on the host."""

    num_bytes: int
    nanoseconds: torch.Tensor  # [2] int64: of copies, of waiting for them

    def report(self) -> StreamReport:
        seconds, stalled = (self.nanoseconds / 1e9).tolist()
        return StreamReport(self.num_bytes, seconds, stalled)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A launched step; its tensors are on the host once ``done`` has come (None: already)."""

    plan: StepPlan
    sampled: Sampled | None
    spans: list[PromptSpan]
    prompt_logprobs: LogprobTensors | None
    trace: StepTrace | None
    done: torch.cuda.Event | None
    tier: HostTier | None = None
    tier_counts: torch.Tensor | None = None  # [5] int64, as of ``HotBlocks``
    lost_block_ids: tuple[int, ...] = ()
    streamed: StreamCount | None = None
    disk: DiskReport | None = None

    def result(self) -> StepResult:
        """What came of the step, after waiting for it alone."""
        if self.done is not None:
            self.done.synchronize()
        tokens = [] if self.sampled is None else _tokens(self.plan, self.sampled, self.trace)
        prompts = prompt_entries(self.spans, self.prompt_logprobs)
        report = None
        if self.tier is not None and self.tier_counts is not None:
            report = self.tier.report(self.tier_counts)
        stream = None if self.streamed is None else self.streamed.report()
        lost = list(self.lost_block_ids)
        return StepResult(self.plan.step_id, tokens, prompts, report, stream, self.disk, lost)


def _tokens(plan: StepPlan, sampled: Sampled, trace: StepTrace | None) -> list[SampledToken]:
    ids = [chunk.request_id for chunk in plan.chunks if chunk.samples]
    tokens = sampled.tokens.tolist()
    logprobs = {}
    if sampled.logprobs is not None:
        entries = sampled.logprobs.entries(sampled.logprob_counts)
        logprobs = dict(zip(sampled.logprob_rows, entries, strict=True))
    traces = {} if trace is None else trace.tokens()
    return [
        SampledToken(request_id, token, logprobs.get(at), trace=_of(token, traces.get(request_id)))
        if token >= 0
        else SampledToken(request_id, token, error=NO_FINITE_LOGITS)
        for at, (request_id, token) in enumerate(zip(ids, tokens, strict=True))
    ]


def _of(token_id: int, trace: TokenTrace | None) -> TokenTrace | None:
    return None if trace is None else msgspec.structs.replace(trace, token_id=token_id)


class ModelRunner:
    """Runs plans, one after the other; the room of step tensors, sampling state and graphs."""

    def __init__(
        self,
        model: Model,
        pool: DevicePool,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        use_graphs: bool,
        uniform: bool = False,
        tier: HostTier | None = None,
        stream: WeightStream | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.tier = tier
        self.stream = stream
        self.disk = disk
        self._num_streamed = 0  # bytes
        self.buffers = StepBuffers(
            pool,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            mask_words=-(-vocab_size // 32),
            uniform=uniform,
            tier=tier,
        )
        self.sampler = Sampler(
            vocab_size, max_rows=max_rows, eos_token_ids=eos_token_ids, device=pool.device
        )
        self.prompts = PromptRows()
        self.traces = TraceRows(pool.device)
        self.graphs = GraphSet(self._forward_all, self.buffers) if use_graphs else None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on the CPU, run it."""
        try:
            return self._launch(plan)
        except BaseException:  # steps go on after Ctrl-C as well
            if self.tier is not None:
                self.tier.forget_hot()
            raise

    def _launch(self, plan: StepPlan) -> PendingStep:
        self._move_pages(plan)
        self._change_rows(plan)
        if not plan.chunks:
            return PendingStep(plan, None, [], None, None, None)
        spans = self.prompts.spans(plan.chunks)
        samples = [chunk for chunk in plan.chunks if chunk.samples]
        trace = self.traces.begin(plan.chunks)
        size = None if trace else self._graph_size(plan.chunks, samples, spans)
        fields, shape = self._stage(plan.chunks, samples, spans, size)
        if plan.residence is not None:
            shape = replace(shape, spilled=plan.residence.spilled)
        if self.graphs is not None and size is not None:
            logits, prompt_hidden = self.graphs.run(fields, shape), None
        else:
            logits, prompt_hidden = self._forward(fields, shape, trace)
        sampled = None
        if samples:
            at_samples = logits[: len(samples)]
            sampled = self.sampler.sample(at_samples, fields, samples, self.buffers.last_tokens)
        logprobs = self._prompt_logprobs(prompt_hidden, spans)
        counts = None if self.tier is None else to_host(self.tier.counts)
        lost = self._take_lost()
        streamed = self._count_streamed()
        done = record_event() if self.pool.device.type == "cuda" else None
        return PendingStep(
            plan, sampled, spans, logprobs, trace, done, self.tier, counts, lost, streamed,
            None if self.disk is None else self.disk.report(),
        )  # fmt: skip

    def _move_pages(self, plan: StepPlan) -> None:
        """What leaves is saved before anything moves, what comes is put where room was made."""
        try:
            self._make_room(plan)
        except BaseException:
            if self.disk is not None:  # its pages have no place, and nobody comes for them again
                self.disk.discard([page.digest for page in plan.arriving])
            raise
        if self.disk is not None and plan.arriving:
            self.disk.load(plan.arriving)

    def _make_room(self, plan: StepPlan) -> None:
        tier = self.tier
        if tier is not None and plan.residence is not None:
            tier.note(plan.residence)
            tier.catch_up(num_left=1)  # of a step that failed: what leaves lies where that put it
        if self.disk is not None and plan.departing:
            self.disk.save(plan.departing)
        if tier is not None:
            tier.catch_up()

    def _take_lost(self) -> tuple[int, ...]:
        moved = () if self.tier is None else self.tier.take_lost()
        return moved if self.disk is None else (*moved, *self.disk.take_lost())

    def _count_streamed(self) -> StreamCount | None:
        if self.stream is None:
            return None
        self._num_streamed += self.stream.plan.host_bytes
        return StreamCount(self._num_streamed, to_host(self.stream.nanoseconds))

    def _change_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self.sampler.free(row)
            self.prompts.free(row)
            self.traces.free(row)
        for start in plan.started:
            self.sampler.start(start)
            self.prompts.start(start)
            self.traces.start(start)
        self.buffers.update_tables(plan)

    def _stage(
        self,
        chunks: Sequence[ScheduledChunk],
        samples: Sequence[ScheduledChunk],
        spans: Sequence[PromptSpan],
        graph_size: int | None,
    ) -> tuple[Tensors, StepShape]:
        """The step's arrays on the device, padded to ``graph_size`` rows, and their sizes."""
        if graph_size is None:
            sizes = _sizes(chunks, samples, spans)
        else:
            sizes = StepSizes(graph_size, graph_size, graph_size, len(samples))
        sizes = replace(
            sizes,
            masks=sum(chunk.mask is not None for chunk in samples),
            mask_words=self.buffers.mask_words,
        )
        host = self.buffers.staging.open(sizes)
        shape = self.buffers.fill(host, sizes, chunks, [span.span for span in spans])
        self.sampler.fill(host, samples)
        return self.buffers.staging.send(sizes), shape

    def _forward(
        self, fields: Tensors, shape: StepShape, trace: StepTrace | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits of the samples, hidden states of the spans' tokens)."""
        inputs = self.buffers.inputs(fields, shape)
        if trace is not None:
            inputs = replace(inputs, observer=trace.observe)
        hidden = self.model.hidden(inputs)[inputs.logits_index]
        if trace is not None:
            self.traces.end(trace)
        num_samples = shape.sizes.samples
        return self.model.logits(hidden[:num_samples]), hidden[num_samples:]

    def _forward_all(self, inputs: StepInputs) -> torch.Tensor:
        return self.model.logits(self.model.hidden(inputs)[inputs.logits_index])

    def _graph_size(
        self,
        chunks: Sequence[ScheduledChunk],
        samples: Sequence[ScheduledChunk],
        spans: Sequence[PromptSpan],
    ) -> int | None:
        """Padded rows where a graph serves the step: one token a row, each sampled from."""
        if self.graphs is None or spans or len(samples) < len(chunks):
            return None
        if any(chunk.num_tokens != 1 for chunk in chunks):
            return None
        return self.graphs.size_for(len(chunks))

    def _prompt_logprobs(
        self, hidden: torch.Tensor | None, spans: Sequence[PromptSpan]
    ) -> LogprobTensors | None:
        """Of the spans' targets; a tile of tokens at a time has its logits made."""
        if not spans or hidden is None:
            return None
        targets = [token for span in spans for token in span.targets]
        tokens = to_device(np.array(targets, np.int64), self.pool.device)
        tiles = (
            (self.model.logits(hidden[at : at + _LOGITS_TILE]), tokens[at : at + _LOGITS_TILE])
            for at in range(0, len(targets), _LOGITS_TILE)
        )
        return self.sampler.logprobs(tiles, top=max(span.num_alternatives for span in spans))


def _sizes(
    chunks: Sequence[ScheduledChunk],
    samples: Sequence[ScheduledChunk],
    spans: Sequence[PromptSpan],
) -> StepSizes:
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    num_logits = len(samples) + sum(span.span.count for span in spans)
    return StepSizes(num_tokens, len(chunks), num_logits, len(samples))
