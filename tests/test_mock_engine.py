"""The engine without a model: a fixed text at a fixed pace, everything else as in the real one."""

import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.engine.mock import TEXT, MockRunner
from nsa_serve.errors import ConfigError
from nsa_serve.request import RequestOutput
from nsa_serve.schedule.plan import RowStart, ScheduledChunk, StepPlan, StepResult
from tests.scripted_engine import Clock, make_request


class Stepper:
    """A runner on a clock that moves only by its sleeping; every row decodes from position 3."""

    def __init__(self, period: float, **sampling: int) -> None:
        self.clock = Clock()
        self.clock.now = 100.0
        self.runner = MockRunner([7, 8, 9], period, clock=self.clock, sleep=self._sleep)
        self._started = [
            RowStart(0, "a", make_request("a", **sampling).sampling, 0, [1] * 3, [], [])
        ]
        self._step = 0

    def _sleep(self, seconds: float) -> None:
        self.clock.now += seconds

    def step(self, start: int = 2, num_tokens: int = 1) -> StepResult:
        chunk = ScheduledChunk(0, "a", start, num_tokens, [], [], True)
        plan = StepPlan(self._step, [], self._started, [chunk])
        self._started, self._step = [], self._step + 1
        return self.runner.launch(plan).result()


def test_steps_come_at_whole_multiples_of_the_period() -> None:
    stepper = Stepper(0.25)
    times = []
    for _ in range(3):
        stepper.step()
        times.append(stepper.clock.now)
    assert times == [100.25, 100.5, 100.75]


def test_missed_steps_are_not_made_up_for() -> None:
    stepper = Stepper(0.25)
    stepper.step()
    stepper.clock.now += 0.6  # to 100.85
    stepper.step()
    assert stepper.clock.now == 101.0


def test_the_token_is_a_matter_of_its_place_in_the_answer() -> None:
    stepper = Stepper(1.0)
    tokens = [stepper.step(start).tokens[0].token_id for start in (2, 3, 4, 5, 2)]
    assert tokens == [7, 8, 9, 7, 7]


@pytest.mark.parametrize(("wanted", "num_top"), [(0, 0), (1, 1), (5, 1)])
def test_logprobs_say_that_the_token_was_certain(wanted: int, num_top: int) -> None:
    stepper = Stepper(1.0, logprobs=wanted, prompt_logprobs=wanted)
    result = stepper.step(start=0, num_tokens=3)
    logprob = result.tokens[0].logprob
    assert logprob is not None
    assert (logprob.token_id, logprob.logprob, len(logprob.top)) == (7, 0.0, num_top)
    (piece,) = result.prompt_logprobs
    assert (piece.start, [entry.token_id for entry in piece.entries]) == (1, [1, 1])


def test_the_whole_engine_answers_with_the_text_again_and_again() -> None:
    engine = Engine.from_config(EngineConfig.from_flags(mock_token_rate=1e6))
    for name, length in (("a", 60), ("b", 7)):
        engine.add(make_request(name, max_tokens=length), 0.0)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step(0.0)
    engine.check()
    said = "".join(output.text for output in outputs if output.request_id == "a")
    assert len(said) > 2 * len(TEXT)
    assert said.startswith(TEXT + TEXT)
    ends = {o.request_id: o.usage for o in outputs if o.finish_reason is not None}
    assert {name: usage.completion_tokens for name, usage in ends.items() if usage} == {
        "a": 60,
        "b": 7,
    }


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), 1e9])
def test_a_pace_that_means_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="--mock-engine"):
        EngineConfig.from_flags(mock_token_rate=rate)
