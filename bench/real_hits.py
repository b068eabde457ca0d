"""Hit rates of hot blocks on real text, by size: ``python -m nsa_serve.bench.real_hits``.

The shipped model reads long documents and talks over many turns with nearly all of its pages in
host memory. Beside its own hot blocks the books of others are kept, of other sizes and without
runners-up, by the same code on the same selections: one run answers for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..config import NSA_MODEL, EngineConfig
from ..engine.build import build_parts
from ..engine.engine import Engine
from ..evaluate.haystack import DEFAULT_TEXT, read_documents
from ..kernels.dispatch import ops_for
from ..kernels.shapes import StepBatch
from ..llm import LLM
from ..memory.device_pool import DevicePool
from ..memory.host_pool import HostPool
from ..memory.layout import KVLayout
from ..memory.prefetch import SelectionPrefetcher, table_bytes
from ..memory.tier import HostTier
from ..models.checkpoint import resolve
from ..models.linear import choose_dtype
from ..request import SamplingParams
from ..runner.worker import choose_device, served_model
from .measure import environment
from .report import save_json, show_table

SLOTS = 48  # page slots of the device, of which a quarter is hot; none of HOT may be larger
HOT = (16, 32, 48)
BUDGET = 512  # tokens of a chunk
COUNTS = ("lookups", "hits", "fetched", "prefetched", "prefetch_hits")
QUESTIONS = ("What is this about?", "Which of it matters most, and why?", "What is new in this?")

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Books:
    """What hot blocks of one size counted, in decode steps and in prefill chunks."""

    num_hot: int  # for each layer and KV head
    with_runners_up: bool
    decode: list[int]  # as of ``COUNTS``
    prefill: list[int]

    @property
    def hit_rate(self) -> float:
        """Of decode steps."""
        return self.decode[1] / max(1, self.decode[0])

    def record(self) -> dict[str, Any]:
        return {
            "hot": self.num_hot,
            "with_runners_up": self.with_runners_up,
            "hit_rate": self.hit_rate,
            "decode": dict(zip(COUNTS, self.decode, strict=True)),
            "prefill": dict(zip(COUNTS, self.prefill, strict=True)),
        }


class ComparedPrefetcher(SelectionPrefetcher):
    """A tier's prefetcher, and others that look up the same without a byte behind it.

    It takes the place of the tier's own before the first step.
    """

    def __init__(self, tier: HostTier, others: Sequence[tuple[int, bool]]) -> None:
        own, pool = tier.prefetcher, tier.pool
        super().__init__(
            pool, own.kv, num_hot=own.num_hot, num_ranked=own.num_ranked, ops=ops_for(pool.device)
        )
        self._shadows = [
            _shadow(tier, num_hot, own.num_ranked if runs_up else 0) for num_hot, runs_up in others
        ]
        self._decodes = False
        self.reset()

    def reset(self) -> None:
        """Count from here on."""
        each = range(1 + len(self._shadows))
        self._before = [one.counts.clone() for one in self._all]
        self._found = {phase: [torch.zeros(5).long() for _ in each] for phase in (True, False)}

    def books(self) -> list[Books]:
        """The tier's own first."""
        decodes, prefills = self._found[True], self._found[False]
        return [
            Books(one.num_hot, one.num_ranked > 0, decode.tolist(), prefill.tolist())
            for one, decode, prefill in zip(self._all, decodes, prefills, strict=True)
        ]

    @property
    def _all(self) -> list[SelectionPrefetcher]:
        return [self, *self._shadows]

    def begin(self) -> None:
        super().begin()
        for shadow in self._shadows:
            shadow.begin()

    def forget(self, block_ids: Tensor) -> None:
        super().forget(block_ids)
        for shadow in self._shadows:
            shadow.forget(block_ids)

    def ensure_resident(self, batch: StepBatch, layer: int, selection: Tensor) -> Tensor:
        self._decodes = batch.max_query_len == 1
        for shadow in self._shadows:
            shadow.ensure_resident(batch, layer, selection)
        return super().ensure_resident(batch, layer, selection)

    def prefetch(
        self, batch: StepBatch, layer: int, selection: Tensor, ranked: Tensor | None
    ) -> None:
        super().prefetch(batch, layer, selection, ranked)
        for shadow in self._shadows:
            shadow.prefetch(batch, layer, selection, ranked if shadow.num_ranked else None)

    def finish(self) -> None:
        super().finish()
        for one, before, found in zip(
            self._all, self._before, self._found[self._decodes], strict=True
        ):
            found += one.counts.cpu() - before.cpu()
            before.copy_(one.counts)


def _shadow(tier: HostTier, num_hot: int, num_ranked: int) -> SelectionPrefetcher:
    """A prefetcher of the tier's slots, one value wide."""
    layout, host = tier.pool.layout, tier.host.num_slots
    thin = KVLayout(layout.num_layers, layout.num_kv_heads, 1, 1, 1, 1, torch.float32)
    pool = DevicePool(
        thin, tier.pool.num_slots, tier.pool.num_blocks, tier.pool.device, num_host=host
    )
    far = HostPool(thin, pool.behind).kv
    kv = [replace(near, host=behind) for near, behind in zip(pool.kv, far, strict=True)]
    ops = ops_for(pool.device)
    return SelectionPrefetcher(pool, kv, num_hot=num_hot, num_ranked=num_ranked, ops=ops)


def open_model(
    model: str, hot: Sequence[int], longest: int, **flags: Any
) -> tuple[LLM, ComparedPrefetcher]:
    """The model over ``SLOTS`` page slots of the device, with room for ``longest`` tokens."""
    config = EngineConfig.from_flags(
        model=model, max_num_seqs=1, max_num_batched_tokens=BUDGET, max_model_len=longest,
        **{"attention": "nsa", **flags},
    )  # fmt: skip
    shape = served_model(resolve(config.source), config)
    layout = KVLayout.of(shape, choose_dtype(config.source.dtype, choose_device(config.device)))
    each = layout.compressed_bytes_per_block + table_bytes(layout.num_layers, layout.num_kv_heads)
    num_host = layout.num_pages(longest) + SLOTS
    cache = replace(
        config.cache,
        kv_host_memory_bytes=num_host * layout.bytes_per_slot,
        kv_cache_memory_bytes=SLOTS * (layout.bytes_per_slot + each) + num_host * each,
    )
    parts = build_parts(replace(config, cache=cache))
    tier = parts.worker.tier
    assert tier is not None, "a host tier was asked for"
    others = [(num_hot, runs_up) for num_hot in hot for runs_up in (False, True)]
    tier.prefetcher = compared = ComparedPrefetcher(tier, others)
    return LLM.over(Engine.of(parts), config), compared


def read_document(llm: LLM, tokens: Sequence[int], context: int, answer: int) -> None:
    """An answer of ``answer`` tokens to a question behind a document, ``context`` in all."""
    question = llm.tokenizer.encode(f"\n\n{QUESTIONS[0]}\n", add_special=False)
    prompt = [*tokens[: context - len(question)], *question]
    llm.generate([prompt], _greedy(answer))


def converse(llm: LLM, passages: Iterator[str], turns: int, answer: int) -> int:
    """Turns that each bring a passage and ask about it. Tokens of the last prompt."""
    messages: list[dict[str, str]] = []
    for turn in range(turns):
        question = QUESTIONS[turn % len(QUESTIONS)]
        messages.append({"role": "user", "content": f"{next(passages)}\n\n{question}"})
        (result,) = llm.chat(messages, _greedy(answer))
        messages.append({"role": "assistant", "content": result.text})
    return result.usage.prompt_tokens


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def passages_of(llm: LLM, tokens: Sequence[int], length: int) -> Iterator[str]:
    """Neighbouring passages of ``length`` tokens."""
    for first in range(0, len(tokens) - length, length):
        yield llm.tokenizer.decode(list(tokens[first : first + length]))


def measure(
    llm: LLM,
    compared: ComparedPrefetcher,
    tokens: Sequence[int],
    *,
    contexts: Sequence[int],
    turns: int,
    passage: int,
    answer: int,
) -> Iterator[dict[str, Any]]:
    """A record of every document, then of the conversation."""
    for context in sorted(contexts):
        compared.reset()
        read_document(llm, tokens, context, answer)
        yield _record("document", context, answer, compared)
    compared.reset()
    context = converse(llm, passages_of(llm, tokens, passage), turns, answer)
    yield _record("chat", context, answer, compared)


def _record(case: str, context: int, answer: int, compared: ComparedPrefetcher) -> dict[str, Any]:
    found = compared.books()
    show_table(
        f"{case}, {context} tokens",
        ["hot", "runners-up", "hits %", *COUNTS],
        [(str(b.num_hot), b.with_runners_up, 100 * b.hit_rate, *b.decode) for b in found],
    )
    books = [one.record() for one in found]
    return {"case": case, "context": context, "answer": answer, "books": books}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for serve.")] = NSA_MODEL,
    text: Annotated[str, typer.Option(help="A held-out source, or a text file.")] = DEFAULT_TEXT,
    packages: Annotated[Path | None, typer.Option(help="Where the corpus is unpacked.")] = None,
    contexts: Annotated[list[int], typer.Option(help="Tokens of a document.")] = [8192, 16384],  # noqa: B006
    turns: Annotated[int, typer.Option(help="Of the conversation.")] = 6,
    passage: Annotated[int, typer.Option(help="Tokens that each turn brings.")] = 1200,
    answer: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96,
    kv_runners_up: Annotated[int, typer.Option(help="As for serve.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Hit rates of hot blocks of several sizes, with and without runners-up."""
    longest = max(*contexts, turns * (passage + answer + 64)) + answer
    llm, compared = open_model(model, HOT, longest, kv_runners_up=kv_runners_up)
    documents = read_documents(text, packages)
    tokens = llm.tokenizer.encode("\n\n".join(documents), add_special=False)
    records = measure(
        llm, compared, tokens, contexts=contexts, turns=turns, passage=passage, answer=answer
    )
    found: dict[str, Any] = {
        "environment": environment(), "model": model, "text": text, "page_slots": SLOTS,
        "runners_up": kv_runners_up, "cases": [],
    }  # fmt: skip
    for record in records:
        found["cases"].append(record)
        if output is not None:
            save_json(output, found)


if __name__ == "__main__":
    app()
