"""The loop of a run: batches, steps, the log, the adapter and the checkpoint, until its end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import AdapterBase
from .batches import BatchSource, MicroBatch, prefetched
from .schedule import Budget, rate
from .storage import RunState, load_checkpoint, save_adapter, save_checkpoint, write_atomically
from .trainer import LOSS_NAMES, Trainer

Tensor = torch.Tensor
LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """``out`` receives log.jsonl and adapter/; ``checkpoint`` what a stopped run goes on from."""

    out: Path
    budget: Budget
    base: AdapterBase
    accumulate: int = 1  # micro-batches of a step
    log_every: int = 10  # steps
    save_seconds: float = 120.0
    checkpoint: Path | None = None
    pause_seconds: float | None = None  # save and end this early; another call goes on
    num_threads: int = 2  # that draw batches
    from_progress: float = 0.0  # where in the curriculum it starts; learning rates start anew
    earlier: tuple[Mapping[str, Any], ...] = ()  # records of the runs it goes on from


class Run:
    """One run, from its start or from its checkpoint to the end of its budget."""

    def __init__(
        self,
        trainer: Trainer,
        source: BatchSource,
        plan: RunPlan,
        *,
        clock: Callable[[], float] = time.perf_counter,
        report: Callable[[str], None] = print,
    ) -> None:
        self.trainer = trainer
        self.source = source
        self.plan = plan
        self.clock = clock
        self.report = report
        self.step, self.num_tokens, self._seconds_before = 0, 0, 0.0
        self._began = clock()
        self._pending: list[tuple[int, Tensor]] = []  # (longest sequence, losses) not yet logged
        self._factor = 0.0  # on the learning rate, of the last step
        self._logged_at = (0.0, 0)
        self._last_row: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Of this run, with those before it was stopped."""
        return self._seconds_before + self.clock() - self._began

    @property
    def progress(self) -> float:
        return self.plan.budget.progress(self.step, self.seconds)

    def go(self) -> None:
        """Resume where there is a checkpoint, train to the end of the budget, save."""
        self.plan.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        saved = self.seconds
        with closing(self._batches()) as batches:
            while self.progress < 1 and not self._is_paused():
                self._advance(list(islice(batches, self.plan.accumulate)))
                if self.seconds - saved > self.plan.save_seconds:
                    self.save()
                    saved = self.seconds
        self.save()

    def _is_paused(self) -> bool:
        limit = self.plan.pause_seconds
        return limit is not None and self.clock() - self._began >= limit

    def save(self) -> None:
        """Write the adapter and, where wanted, the checkpoint; what is saved is logged before."""
        if self._pending:
            self._log()
        training = {
            "step": self.step, "num_tokens": self.num_tokens, "seconds": round(self.seconds, 1),
            "last": self._last_row,
        }  # fmt: skip
        if self.plan.earlier:
            training["earlier"] = list(self.plan.earlier)
        size = save_adapter(
            self.plan.out / "adapter", self.trainer.adapter, base=self.plan.base,
            training=training,
        )  # fmt: skip
        self.report(f"step {self.step}: adapter saved, {size / 1e6:.1f} MB")
        if self.plan.checkpoint is not None:
            state = RunState(self.step, self.num_tokens, self.seconds)
            trainer = self.trainer
            save_checkpoint(self.plan.checkpoint, trainer.adapter, trainer.optimiser, state)

    def _resume(self) -> None:
        if self.plan.checkpoint is None:
            return
        trainer = self.trainer
        state = load_checkpoint(self.plan.checkpoint, trainer.adapter, trainer.optimiser)
        if state is not None:
            self.step, self.num_tokens = state.step, state.num_tokens
            self._seconds_before, self._began = state.seconds, self.clock()
            self._logged_at = (self.seconds, self.num_tokens)
            _trim_log(self.plan.out / LOG, self.step)
            self.report(f"going on from step {self.step}, {state.seconds:.0f} s")

    def _batches(self) -> Generator[MicroBatch]:
        return prefetched(
            self._draw, self.step * self.plan.accumulate, num_threads=self.plan.num_threads
        )

    def _draw(self, index: int) -> MicroBatch:
        # The clock's progress is that of when the batch is made: a few batches early.
        along = self.plan.budget.progress(index // self.plan.accumulate, self.seconds)
        start = self.plan.from_progress
        return self.source.draw(index, start + (1 - start) * along)

    def _advance(self, batches: list[MicroBatch]) -> None:
        on_device = [batch.to(self.trainer.device) for batch in batches]
        self._factor = rate(self.progress)
        losses, norm = self.trainer.step(on_device, self._factor)
        for batch, found in zip(batches, losses, strict=True):
            row = torch.cat([found.stacked().detach(), norm[None].float()])
            self._pending.append((batch.longest, row))
        self.step += 1
        self.num_tokens += sum(sum(batch.seq_lens) for batch in batches)
        if self.step % self.plan.log_every == 0 or self.progress >= 1:
            self._log()

    def _log(self) -> None:
        """One row of the steps since the last: the only place that waits for the device."""
        table = torch.stack([row for _, row in self._pending]).cpu()
        lengths = [length for length, _ in self._pending]
        self._pending = []
        seconds = self.seconds
        passed, tokens = seconds - self._logged_at[0], self.num_tokens - self._logged_at[1]
        self._logged_at = (seconds, self.num_tokens)
        means = dict(zip((*LOSS_NAMES, "norm"), table.nanmean(0).tolist(), strict=True))
        # What is never absent shows when it is not finite.
        means |= {"loss": float(table[:, 0].mean()), "norm": float(table[:, -1].mean())}
        row = {
            "step": self.step, "seconds": round(seconds, 2), "num_tokens": self.num_tokens,
            "tokens_per_second": round(tokens / max(passed, 1e-9)), "rate": round(self._factor, 5),
            **{name: None if math.isnan(v) else round(v, 5) for name, v in means.items()},
            "lengths": lengths,
            "each": [[_rounded(v) for v in one] for one in table.tolist()],
        }  # fmt: skip
        self._last_row = {k: v for k, v in row.items() if k not in ("lengths", "each")}
        with (self.plan.out / LOG).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.report(_line(row))


def _trim_log(path: Path, step: int) -> None:
    """Take away the rows of steps after the checkpoint's, which are done again, and a torn one."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(kept))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _line(row: dict[str, Any]) -> str:
    shown = (*LOSS_NAMES, "norm")
    losses = " ".join(f"{n} {row[n]:.3f}" for n in shown if row[n] is not None)
    return (
        f"step {row['step']:5d} {row['seconds']:6.0f} s {row['tokens_per_second'] / 1e3:6.1f} "
        f"ktok/s  {losses}  longest {max(row['lengths'])}"
    )
