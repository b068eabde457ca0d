"""Micro-batches: which sequences of which lengths, and which of their tokens are learnt from.

Micro-batch i is a function of (seed, i, progress) alone, so that a run that was stopped goes on
with the batches it would have had.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.shapes import NSAShape
from .dialogues import Dialogues, draw_to_length
from .importance import Probe
from .sequences import (
    ANSWER,
    PADDING,
    SPOKEN,
    SequenceWriter,
    TrainingSequence,
    as_columns,
    lengths_of,
)

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Stage:
    """Up to this share of the run, longest sequences of a micro-batch and how often each."""

    until: float
    lengths: tuple[tuple[int, float], ...]


CURRICULUM = (
    Stage(0.30, ((1024, 0.15), (2048, 0.15), (4096, 0.25), (8192, 0.45))),
    Stage(0.48, ((2048, 0.10), (4096, 0.10), (8192, 0.25), (16384, 0.55))),
    Stage(0.68, ((2048, 0.10), (8192, 0.20), (16384, 0.20), (32768, 0.50))),
    Stage(1.00, ((2048, 0.06), (8192, 0.12), (16384, 0.07), (32768, 0.20), (65536, 0.55))),
)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How micro-batches are made."""

    num_tokens: int = 65_536  # of a micro-batch, whatever its sequences
    num_learnt: int = 20_480  # tokens whose logits are computed; answers come first
    teacher_limit: int = 8192  # tokens of a window of the teacher, whole pages
    teacher_past: int = 512  # tokens that it has read of a window before it is heard
    num_probes: int = 2  # sequences whose block scores are trained
    probe_tokens: int = 96  # of each of them
    dialogue_share: float = 0.25  # of micro-batches, where there are dialogues
    known_share: float = 0.35  # of the chats of these, whose answers are right and not the base's
    curriculum: tuple[Stage, ...] = CURRICULUM


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences, on the CPU or on a device."""

    index: int
    seq_lens: tuple[int, ...]
    token_ids: Tensor  # [T] int64
    rows: Tensor  # [R] int64, tokens whose successors are predicted
    targets: Tensor  # [R] int64
    answers: Tensor  # [R] bool: what is right, and neither text nor the teacher's
    spoken: Tensor  # [R] bool: what the teacher said itself
    graded: Tensor  # [R] bool: cross-entropy counts; elsewhere only what a teacher says
    taught: Tensor  # [R] bool: the teacher has read enough to be heard
    teacher_lens: tuple[int, ...]  # the same tokens in the windows that the teacher reads
    probes: tuple[Probe, ...]

    @property
    def longest(self) -> int:
        return max(self.seq_lens)

    @property
    def texts(self) -> Tensor:
        """[R] bool: text that is learnt, and nobody's answer."""
        return self.graded & ~self.answers & ~self.spoken

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``, copied while the host goes on."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        probes = tuple(replace(probe, positions=move(probe.positions)) for probe in self.probes)
        return replace(
            self,
            token_ids=move(self.token_ids),
            rows=move(self.rows),
            targets=move(self.targets),
            answers=move(self.answers),
            spoken=move(self.spoken),
            graded=move(self.graded),
            taught=move(self.taught),
            probes=probes,
        )


class BatchSource:
    """Draws micro-batches: texts and exercises, and dialogues where there are any."""

    def __init__(
        self,
        writer: SequenceWriter,
        plan: BatchPlan,
        nsa: NSAShape,
        seed: int,
        dialogues: Dialogues | None = None,
    ) -> None:
        self.writer = writer
        self.plan = plan
        self.nsa = nsa
        self.seed = seed
        self.dialogues = dialogues

    def draw(self, index: int, progress: float) -> MicroBatch:
        """Micro-batch ``index`` of a run that has come ``progress`` (0 … 1) of its way."""
        # Draws of its own: all other micro-batches are what they were without dialogues.
        rng = random.Random(f"{self.seed}:{index}:dialogues")
        if self.dialogues is None or rng.random() >= self.plan.dialogue_share:
            return self.draw_texts(index, progress)
        sequences = draw_to_length(rng, self._chat, self.plan.num_tokens, self.nsa.page)
        return self._micro_batch(rng, index, sequences)

    def _chat(self, rng: random.Random) -> TrainingSequence:
        assert self.dialogues is not None
        if rng.random() < self.plan.known_share:
            return self.writer.known(rng)
        return self.dialogues.draw(rng)

    def draw_texts(self, index: int, progress: float) -> MicroBatch:
        """The same without dialogues."""
        rng = random.Random(f"{self.seed}:{index}")
        plan = self.plan
        stage = next((s for s in plan.curriculum if progress < s.until), plan.curriculum[-1])
        choices, weights = zip(*stage.lengths, strict=True)
        (longest,) = rng.choices(choices, weights)
        longest = min(longest, plan.num_tokens)
        lens = lengths_of(rng, longest, plan.num_tokens, self.nsa.page)
        sequences = [self.writer.draw(rng, length) for length in lens]
        return self._micro_batch(rng, index, sequences)

    def _micro_batch(
        self, rng: random.Random, index: int, sequences: Sequence[TrainingSequence]
    ) -> MicroBatch:
        lens = [len(sequence.tokens) for sequence in sequences]
        windows = [_windows(length, self.plan.teacher_limit) for length in lens]
        tokens, kinds = as_columns(sequences)
        rows = self._learnt_rows(rng, lens, kinds)
        target_kinds = kinds[rows + 1]
        return MicroBatch(
            index=index,
            seq_lens=tuple(lens),
            token_ids=torch.from_numpy(tokens.astype(np.int64)),
            rows=torch.from_numpy(rows),
            targets=torch.from_numpy(tokens[rows + 1].astype(np.int64)),
            answers=torch.from_numpy(target_kinds == ANSWER),
            spoken=torch.from_numpy(target_kinds == SPOKEN),
            graded=torch.from_numpy(target_kinds > 0),
            taught=torch.from_numpy(_heard(windows, self.plan.teacher_past)[rows]),
            teacher_lens=tuple(length for parts in windows for length in parts),
            probes=self._probes(rng, lens, kinds),
        )

    def _learnt_rows(
        self, rng: random.Random, lens: Sequence[int], kinds: NDArray[np.int8]
    ) -> NDArray[np.int64]:
        """Tokens whose successor is an answer's, and others by chance, ascending."""
        followed = np.ones(len(kinds), bool)
        followed[np.cumsum(lens) - 1] = False  # no sequence predicts the next one's first token
        successor = np.append(kinds[1:], 0)
        answers = np.flatnonzero(followed & (successor >= ANSWER))
        others = np.flatnonzero(followed & (successor < ANSWER) & (successor != PADDING))
        draw = np.random.default_rng(rng.getrandbits(64))
        if len(answers) > self.plan.num_learnt:
            answers = draw.choice(answers, self.plan.num_learnt, replace=False)
        wanted = min(self.plan.num_learnt - len(answers), len(others))
        chosen = draw.choice(others, wanted, replace=False)
        return np.sort(np.concatenate([answers, chosen])).astype(np.int64)

    def _probes(
        self, rng: random.Random, lens: Sequence[int], kinds: NDArray[np.int8]
    ) -> tuple[Probe, ...]:
        """Half of each probe's tokens predict answers, where its sequence has any."""
        starts = np.concatenate([[0], np.cumsum(lens)])
        # Below this, every block is selected.
        long = [i for i, length in enumerate(lens) if length > self.nsa.dense_len]
        chosen = rng.sample(long, min(self.plan.num_probes, len(long)))
        return tuple(
            self._probe(rng, int(starts[i]), lens[i], kinds[starts[i] : starts[i + 1]])
            for i in chosen
        )

    def _probe(self, rng: random.Random, start: int, length: int, kinds: NDArray[np.int8]) -> Probe:
        first, count = self.nsa.dense_len, self.plan.probe_tokens
        answers = (np.flatnonzero(kinds[first + 1 :] == ANSWER) + first).tolist()
        asked = rng.sample(answers, min(count // 2, len(answers)))
        plain = [rng.randrange(first, length) for _ in range(count - len(asked))]
        return Probe(start, length, torch.tensor(sorted([*asked, *plain])))


def _windows(length: int, limit: int) -> list[int]:
    """``length`` tokens in parts of ``limit`` and a shorter last one."""
    return [min(limit, length - at) for at in range(0, length, limit)]


def _heard(windows: Sequence[Sequence[int]], past: int) -> NDArray[np.bool_]:
    """[T]: tokens with ``past`` others before them in their window, or in its sequence's first."""
    parts = [
        (np.arange(length) >= past) | (number == 0)
        for lens in windows
        for number, length in enumerate(lens)
    ]
    return np.concatenate(parts)


def prefetched(
    draw: Callable[[int], MicroBatch], start: int, *, num_ahead: int = 4, num_threads: int = 2
) -> Generator[MicroBatch]:
    """``draw(start)``, ``draw(start + 1)``, … made by threads that stay ``num_ahead`` ahead.

    Closing the iterator ends the threads. What ``draw`` raises is raised here.
    """
    stop = threading.Event()
    lanes: list[queue.Queue[MicroBatch | BaseException]] = [
        queue.Queue(max(1, num_ahead // num_threads)) for _ in range(num_threads)
    ]

    def work(lane: int) -> None:
        index = start + lane
        while not stop.is_set():
            try:
                made: MicroBatch | BaseException = draw(index)
            except Exception as error:
                made = error
            _put(lanes[lane], made, stop)
            index += num_threads

    threads = [
        threading.Thread(target=work, args=(lane,), daemon=True) for lane in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    try:
        at = 0
        while True:
            made = lanes[at % num_threads].get()
            if isinstance(made, BaseException):
                raise made
            yield made
            at += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _put(
    lane: queue.Queue[MicroBatch | BaseException],
    made: MicroBatch | BaseException,
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            lane.put(made, timeout=0.1)
        except queue.Full:
            continue
        return
