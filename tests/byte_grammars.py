"""An engine whose tokens are bytes, over a runner that says any bytes its masks allow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from nsa_serve.cache.manager import CacheManager
from nsa_serve.config import ScheduleConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.engine.followers import Followers
from nsa_serve.engine.grammar import GrammarCompiler
from nsa_serve.request import GrammarKind, GrammarSpec
from nsa_serve.schedule.plan import SampledToken, ScheduledChunk, StepPlan, StepResult
from nsa_serve.schedule.scheduler import Scheduler
from nsa_serve.tokenizer import Tokenizer, TokenizerSource
from tests.scripted_engine import Clock, Outputs, Pending, make_request

EOS = 256
MARK = 257  # another special token
VOCAB = 270  # more than there are tokens, and no multiple of 32
# What ends numbers, strings and lists comes up more often than among all bytes.
_LIKELY = frozenset(b'"}],:0 \n')


def byte_tokenizer() -> Tokenizer:
    """Byte b is token b; behind them an end token and a mark."""
    pieces = {piece: byte for byte, piece in enumerate(_byte_pieces())}
    fast = tokenizers.Tokenizer(BPE(vocab=pieces, merges=[]))
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = ByteLevelDecoder()
    fast.add_special_tokens(["<|end|>", "<|mark|>"])
    source = TokenizerSource(tokenizer_json=fast.to_str(), special_tokens={"eos_token": "<|end|>"})
    return Tokenizer(source)


def _byte_pieces() -> list[str]:
    """The character that stands for each byte: visible Latin-1 for itself, the rest behind."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def byte_compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids=[EOS])


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON, json.dumps(value))


def regex(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, text)


def choice(*texts: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.CHOICE, json.dumps(texts))


def grammar(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.GRAMMAR, text)


def allowed(mask: bytes) -> list[int]:
    """The token ids that a mask allows."""
    assert len(mask) == 4 * -(-VOCAB // 32)
    return [8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


class MaskedRunner:
    """A token is a function of those before it, the request's seed and its mask alone."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.seeds: dict[str, int] = {}
        self.plans: list[StepPlan] = []
        self.errors: dict[int, Exception] = {}  # raised by the launch of these steps

    def launch(self, plan: StepPlan) -> Pending:
        self.plans.append(plan)
        if plan.step_id in self.errors:
            raise self.errors[plan.step_id]
        for start in plan.started:
            known = [*start.prompt_token_ids, *start.output_token_ids]
            # A token that was in flight when the request was preempted is known here already.
            held = self.tokens.get(start.request_id, [])
            assert known[: len(held)] == held[: len(known)]
            self.tokens[start.request_id] = known
            self.seeds[start.request_id] = start.seed
        sampled = [self._sample(chunk) for chunk in plan.chunks if chunk.samples]
        return Pending(StepResult(plan.step_id, sampled))

    def _sample(self, chunk: ScheduledChunk) -> SampledToken:
        past = self.tokens[chunk.request_id][: chunk.start + chunk.num_tokens]
        token_id = next_token(past, self.seeds[chunk.request_id], chunk.mask)
        self.tokens[chunk.request_id] = [*past, token_id]
        return SampledToken(chunk.request_id, token_id)


def next_token(past: Sequence[int], seed: int, mask: bytes | None) -> int:
    digest = blake2b(repr((list(past), seed)).encode(), digest_size=8).digest()
    number, coin = int.from_bytes(digest[:6]), digest[7] % 2
    choices = list(range(256)) if mask is None else allowed(mask)
    likely = [token for token in choices if token in _LIKELY or token == EOS]
    picks = likely if coin and likely else choices
    return picks[number % len(picks)]


class GrammarBench(Outputs):
    """An engine over a ``MaskedRunner`` and a fake clock; checks its books after each step.

    Whoever steps the engine itself gives the ``clock`` it steps by.
    """

    def __init__(
        self,
        compiler: GrammarCompiler | None = None,
        *,
        depth: int = 0,
        num_blocks: int = 400,
        token_budget: int = 64,
        max_num_seqs: int = 8,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = byte_tokenizer()
        cache = CacheManager(num_blocks, 4)
        self.scheduler = Scheduler(
            ScheduleConfig(max_num_seqs=max_num_seqs),
            cache,
            max_model_len=1024,
            token_budget=token_budget,
            eos_token_ids=frozenset({EOS}),
            depth=depth,
        )
        self.cache, self.clock, self.runner = cache, Clock(), MaskedRunner()
        self.followers = Followers(compiler or byte_compiler())
        self.engine = Engine(
            self.scheduler,
            cache,
            self.runner,
            self.tokenizer,
            vocab_size=VOCAB,
            depth=depth,
            clock=clock or self.clock,
            followers=self.followers,
        )

    def add(self, name: str, spec: GrammarSpec | None, **sampling: Any) -> None:
        sampling.setdefault("max_tokens", 400)
        prompt = sampling.pop("prompt", b"say")
        request = make_request(name, list(prompt), grammar=spec, **sampling)
        self.engine.add(request, self.clock())
        self.outputs[name] = []

    def step(self, seconds: float = 0.001) -> None:
        self.clock.now += seconds
        for output in self.engine.step(self.clock()):
            self.keep(output)
        self.engine.check()

    def drain(self, max_steps: int = 20_000) -> None:
        while self.engine.has_work:
            max_steps -= 1
            assert max_steps > 0, "the engine makes no progress"
            self.step()
        assert self.cache.num_in_use == 0
        assert len(self.followers) == 0, "a grammar is kept without its request"
        assert all(map(self.is_ended, self.outputs))

    def run(self, name: str, spec: GrammarSpec | None, **sampling: Any) -> str:
        """The text of one request, run to its end with whatever else is there."""
        self.add(name, spec, **sampling)
        self.drain()
        return self.text(name)

    def run_others(self, count: int) -> bool:
        """Whether ``count`` requests without a grammar run to their ends now."""
        names = [f"other-{len(self.outputs)}-{number}" for number in range(count)]
        for name in names:
            self.add(name, None, max_tokens=6, ignore_eos=True)
        for _ in range(100):
            if all(map(self.is_ended, names)):
                return True
            self.step()
        return False
