"""A short run on one batch shape after the other: what a device can do, before a long run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import TrainingFailed
from .batches import BatchSource, Stage
from .schedule import rate
from .step_zero import step_zero
from .trainer import Trainer

_TIMED = 4  # steps at each length, the first of which is not counted


def smoke(
    trainer: Trainer,
    source: BatchSource,
    *,
    lengths: Sequence[int],
    steps: int,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train ``steps`` at the first length, then time every length.

    Raises ``TrainingFailed`` where a trained tensor gets no gradient or the loss is not finite.
    """
    at = {length: _source_of(source, length) for length in lengths}
    first = at[lengths[0]]
    zero = step_zero(trainer, first.draw(0, 0.0))
    report(f"step 0: {zero}")
    curve = []
    for step in range(steps):
        batch = first.draw(step, 0.0).to(trainer.device)
        (losses,), norm = trainer.step([batch], rate(step / steps))
        row = [losses.loss.detach(), losses.answers_right, norm]
        curve.append([float(value) for value in row])
        if step in (0, 1, steps - 1) or step % 10 == 0:
            report(f"step {step}: loss {curve[-1][0]:.4f}, gradient {curve[-1][2]:.3f}")
        if step == 1:  # at step 0, the second factors alone have gradients
            _check_gradients(trainer)
    if not all(math.isfinite(loss) for loss, _, _ in curve):
        raise TrainingFailed("the loss is not finite")
    timed = {str(length): _timed(trainer, at[length], report) for length in lengths}
    return {"step_zero": zero, "curve": curve, "timed": timed}


def _source_of(source: BatchSource, length: int) -> BatchSource:
    stage = Stage(1.0, ((length, 1.0),))
    plan = replace(source.plan, curriculum=(stage,))
    return BatchSource(source.writer, plan, source.nsa, source.seed)


def _check_gradients(trainer: Trainer) -> None:
    for name, tensor in trainer.adapter.tensors.items():
        grads = tensor.grad
        if grads is None or not bool(grads.flatten(1).any(1).all()):
            raise TrainingFailed(f"{name} gets no gradient in some layer")


def _timed(
    trainer: Trainer, source: BatchSource, report: Callable[[str], None]
) -> dict[str, float]:
    """Tokens per second and peak bytes of steps at one length."""
    on_gpu = trainer.device.type == "cuda"
    batches = [source.draw(i, 0.0).to(trainer.device) for i in range(_TIMED)]
    seconds = 0.0
    for i, batch in enumerate(batches):
        if i == 1:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        trainer.step([batch], 0.0)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    speed = (_TIMED - 1) * source.plan.num_tokens / seconds
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    longest = batches[-1].longest
    report(f"longest {longest}: {speed / 1e3:.1f} ktok/s, peak {peak / 1e9:.1f} GB")
    return {"tokens_per_second": round(speed), "peak_bytes": peak}
