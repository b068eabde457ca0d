"""A model with a poisoned paged cache of its own, driven chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsa_serve.kernels.shapes import NSAShape
from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.step import StepInputs

from .paged import chunks_of, make_tables, step_batch


class PagedModel:
    """``decoder`` and pages for requests of up to these many tokens, all NaN at first."""

    def __init__(
        self,
        decoder: Decoder,
        lengths: Sequence[int],
        seed: int = 0,
        resident: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        nsa = decoder.config.nsa
        shape = nsa.shape if nsa else NSAShape()
        self.decoder = decoder
        self.resident = resident
        self.tables = make_tables(lengths, shape, seed)
        layout = KVLayout.of(decoder.config, decoder.dtype)
        self.pool = DevicePool(layout, self.tables.num_slots, self.tables.num_blocks, "cpu")
        for view in [*self.pool.kv, *(self.pool.compressed or [])]:
            view.k.fill_(torch.nan)
            view.v.fill_(torch.nan)

    def step(self, chunks: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Hidden states [T, H] of a step of chunks (request, first position, its tokens)."""
        tokens = [token for _, _, ids in chunks for token in ids]
        inputs = StepInputs(
            token_ids=torch.tensor(tokens),
            batch=step_batch(self.tables, [(row, start, len(ids)) for row, start, ids in chunks]),
            kv=self.pool.kv,
            compressed=self.pool.compressed,
            logits_index=torch.arange(len(tokens)),
            resident=self.resident,
        )
        return self.decoder.hidden(inputs)

    def prefill(
        self, ids: Sequence[int], sizes: Sequence[int] = (1 << 20,), row: int = 0
    ) -> Tensor:
        """Logits [T, V] of one prompt, computed in chunks of these sizes."""
        chunks = chunks_of(len(ids), sizes)
        hidden = [self.step([(row, at, ids[at : at + count])]) for at, count in chunks]
        return self.decoder.logits(torch.cat(hidden))

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """``count`` greedy tokens after each prompt; all are decoded together."""
        ends = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
        hidden = self.step([(row, 0, ids) for row, ids in enumerate(prompts)])[ends]
        outputs: list[list[int]] = [[] for _ in prompts]
        for at in range(count):
            for output, token in zip(
                outputs, self.decoder.logits(hidden).argmax(1).tolist(), strict=True
            ):
                output.append(token)
            if at + 1 < count:
                starts = [len(ids) + at for ids in prompts]
                last = zip(starts, outputs, strict=True)
                hidden = self.step([(row, start, o[-1:]) for row, (start, o) in enumerate(last)])
        return outputs
