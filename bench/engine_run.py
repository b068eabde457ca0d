"""A whole engine of a named shape with random weights, driven without a server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cache.manager import CacheManager, Match
from ..config import EngineConfig
from ..engine.build import EngineParts, build_parts
from ..engine.engine import Engine
from ..errors import ConfigError
from ..request import EngineRequest, FinishReason, Request, RequestOutput, SamplingParams
from ..runner.worker import Worker

SHAPES = Path(__file__).parent / "shapes"


def shape_names() -> list[str]:
    """Shapes that ship: folders with a config.json, to which anyone can add."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def shape_folder(name: str) -> Path:
    """The folder of a shape: one that ships, or any folder with a config.json."""
    for folder in (SHAPES / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(f"--shape {name}: no such folder with a config.json; known: {shape_names()}")


def _free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


@dataclass(slots=True)
class BenchEngine:
    """The engine and the parts that a measurement looks at."""

    engine: Engine
    parts: EngineParts[Worker]
    load_seconds: float
    free_before: int = 0  # bytes of the device
    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)

    @classmethod
    def start(cls, shape: str, **flags: Any) -> BenchEngine:
        """Build the engine of ``shape`` with random weights. Flags are the server's."""
        config = EngineConfig.from_flags(
            model=str(shape_folder(shape)), random_weights=True, **flags
        )
        free = _free_bytes()
        start = time.perf_counter()
        parts = build_parts(config)
        engine = Engine(
            parts.scheduler, parts.cache, parts.worker, parts.tokenizer,
            vocab_size=parts.description.vocab_size, depth=parts.depth,
            description=parts.description,
        )  # fmt: skip
        return cls(engine, parts, time.perf_counter() - start, free)

    def memory(self) -> dict[str, int]:
        """Bytes of the device: what was to be taken in all, and what is taken now."""
        share = self.parts.worker.config.cache.gpu_memory_utilization
        return {
            "planned_bytes": int(share * self.free_before),
            "taken_bytes": self.free_before - _free_bytes(),
        }

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Random token ids; no two seeds share a page."""
        generator = torch.Generator().manual_seed(seed)
        vocab = self.parts.description.vocab_size
        return torch.randint(10, vocab, (num_tokens,), generator=generator).tolist()

    def fill_caches(self) -> None:
        """Random normal K/V and compressed entries, so that no kernel is timed on zeros."""
        pool = self.parts.worker.pool
        for kv in pool.kv:
            kv.k.normal_()
            kv.v.normal_()
        for entries in pool.compressed or []:
            entries.k.normal_()
            entries.v.normal_()

    def pretend_cached(self, prompt: list[int]) -> None:
        """File the prompt's pages as computed, whatever they hold.

        Decode steps at a long context are then timed without the minutes of its prefill: content
        doesn't change what a step reads.
        """
        cache: CacheManager = self.parts.cache
        index = -1 - len(self.outputs)
        request = Request("pretend", prompt, SamplingParams(), arrival=0.0, index=index)
        cache.add(request)
        cache.allocate(request, Match([], 0))
        # In chunks, as a prefill comes: with a host tier the pages of a chunk stay on the device.
        budget = self.parts.worker.token_budget
        while request.num_computed < len(prompt):
            end = min(request.num_computed + budget, len(prompt))
            if cache.extend(request, end) is None:
                raise ConfigError(f"the cache of {cache.num_blocks} pages is too small here")
            request.num_computed = end
        cache.publish(request, len(prompt))
        cache.withdraw(request)
        cache.free(request)
        cache.remove(request)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
        self.outputs[name] = []
        self.engine.add(request, time.monotonic())

    def step(self) -> None:
        for output in self.engine.step(time.monotonic()):
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
            self.outputs[output.request_id].append(output)

    def run_until_first_tokens(self) -> None:
        """Step until every request has a token or has ended."""
        while not all(self.outputs.values()):
            self.step()

    def start_decodes(self, num_requests: int, context: int, max_tokens: int) -> None:
        """Requests of ``context`` cached tokens, until each has given its first."""
        for i in range(num_requests):
            prompt = self.prompt(context, seed=context + i)
            self.pretend_cached(prompt)
            self.add(f"decode-{i}", prompt, max_tokens)
        self.run_until_first_tokens()

    def timed_steps(self, num_steps: int) -> list[float]:
        """Milliseconds from the end of one step to that of the next: the engine overlaps steps."""
        samples, last = [], time.perf_counter()
        for _ in range(num_steps):
            self.step()
            samples.append(1e3 * ((now := time.perf_counter()) - last))
            last = now
        return samples

    def finish(self) -> None:
        """Step until nothing is left, and forget the outputs."""
        while self.engine.has_work:
            self.step()
        self.engine.check()
        self.outputs.clear()
