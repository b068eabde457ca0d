"""An engine over a runner that gives the tokens it is told to, and fails when it is told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsa_serve.cache.manager import CacheManager
from nsa_serve.config import ScheduleConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.request import EngineRequest, RequestOutput, SamplingParams, TokenLogprob
from nsa_serve.runner.model_runner import NO_FINITE_LOGITS
from nsa_serve.schedule.plan import PromptLogprobs, SampledToken, StepPlan, StepResult
from nsa_serve.schedule.scheduler import Scheduler
from nsa_serve.tokenizer import Tokenizer

VOCAB = 49152
EOS = 2


@dataclass
class Pending:
    outcome: StepResult | BaseException

    def result(self) -> StepResult:
        if isinstance(self.outcome, BaseException):
            raised, self.outcome = self.outcome, RuntimeError("the result is gone")
            raise raised
        return self.outcome


@dataclass
class ScriptedRunner:
    """Token i of a request is entry i of its script, whatever was preempted in between.

    ``launch_errors`` and ``result_errors`` are raised by the step of that number; requests in
    ``void`` get an error in place of a token.
    """

    scripts: Mapping[str, Sequence[int]]
    prompt_lens: dict[str, int] = field(default_factory=dict)
    launch_errors: dict[int, BaseException] = field(default_factory=dict)
    result_errors: dict[int, BaseException] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)
    plans: list[StepPlan] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> Pending:
        self.plans.append(plan)
        for start in plan.started:
            self.prompt_lens[start.request_id] = len(start.prompt_token_ids)
        if plan.step_id in self.launch_errors:
            raise self.launch_errors[plan.step_id]
        if plan.step_id in self.result_errors:
            return Pending(self.result_errors[plan.step_id])
        tokens = [self._token(chunk) for chunk in plan.chunks if chunk.samples]
        return Pending(StepResult(plan.step_id, tokens, self._prompt_logprobs(plan)))

    def _token(self, chunk: Any) -> SampledToken:
        name = chunk.request_id
        if name in self.void:
            return SampledToken(name, -1, error=NO_FINITE_LOGITS)
        script = self.scripts[name]
        at = chunk.start + chunk.num_tokens - self.prompt_lens[name]
        token_id = script[at % len(script)]
        return SampledToken(name, token_id, TokenLogprob(token_id, -1.0, 1, []))

    def _prompt_logprobs(self, plan: StepPlan) -> list[PromptLogprobs]:
        pieces = []
        for chunk in plan.chunks:
            start, stop = chunk.start + 1, chunk.start + chunk.num_tokens + 1
            stop = min(stop, self.prompt_lens[chunk.request_id])
            entries = [TokenLogprob(i, -float(i), 1, []) for i in range(start, stop)]
            if entries and chunk.request_id.startswith("prompt-logprobs"):
                pieces.append(PromptLogprobs(chunk.request_id, start, entries))
        return pieces


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Outputs:
    """Every output of each request that was announced with an empty list; none after its final."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {}

    def is_ended(self, name: str) -> bool:
        outputs = self.outputs[name]
        return bool(outputs) and outputs[-1].finish_reason is not None

    def final(self, name: str) -> RequestOutput:
        assert self.is_ended(name)
        return self.outputs[name][-1]

    def text(self, name: str) -> str:
        return "".join(output.text for output in self.outputs[name])

    def token_ids(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]

    def keep(self, output: RequestOutput) -> None:
        assert not self.is_ended(output.request_id), "an output after the final one"
        self.outputs[output.request_id].append(output)


def make_request(
    name: str,
    prompt: Sequence[int] = (5, 6, 7),
    *,
    stream: bool = True,
    timeout: float | None = None,
    **sampling: Any,
) -> EngineRequest:
    sampling.setdefault("max_tokens", 8)
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**sampling),
        stream=stream,
        timeout=timeout,
    )


class Bench(Outputs):
    """An engine, its runner and a fake clock; keeps every output and checks the books each step."""

    def __init__(
        self,
        scripts: Mapping[str, Sequence[int]],
        tokenizer: Tokenizer | None = None,
        *,
        depth: int = 0,
        num_blocks: int = 64,
        token_budget: int = 32,
        max_num_queued_reqs: int = 64,
    ) -> None:
        super().__init__()
        cache = CacheManager(num_blocks, 4)
        self.scheduler = Scheduler(
            ScheduleConfig(max_num_seqs=8, max_num_queued_reqs=max_num_queued_reqs),
            cache,
            max_model_len=128,
            token_budget=token_budget,
            eos_token_ids=frozenset({EOS}),
            depth=depth,
        )
        self.cache = cache
        self.runner = ScriptedRunner(scripts)
        self.clock = Clock()
        self.engine = Engine(
            self.scheduler,
            cache,
            self.runner,
            tokenizer,
            vocab_size=VOCAB,
            depth=depth,
            clock=self.clock,
        )

    def add(self, name: str, prompt: Sequence[int] = (5, 6, 7), **sampling: Any) -> None:
        fields = {key: sampling.pop(key) for key in ("stream", "timeout") if key in sampling}
        self.engine.add(make_request(name, prompt, **fields, **sampling), self.clock())
        self.outputs[name] = []

    def abort(self, name: str) -> None:
        output = self.engine.abort(name, self.clock())
        if output is not None:
            self.keep(output)

    def step(self) -> None:
        self.clock.now += 1.0
        for output in self.engine.step(self.clock()):
            self.keep(output)
        self.engine.check()

    def drain(self, max_steps: int = 1000) -> None:
        while self.engine.has_work:
            max_steps -= 1
            assert max_steps > 0, "the engine makes no progress"
            self.step()
        assert self.cache.num_in_use == 0
        assert all(self.is_ended(name) for name in self.outputs)
