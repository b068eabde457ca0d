"""Time-outs and full queues as the engine's callers and HTTP clients see them."""

import asyncio
from typing import Any

import pytest

from nsa_serve.config import EngineConfig, Policy
from nsa_serve.errors import ConfigError, Overloaded
from nsa_serve.request import FinishReason, RequestOutput
from nsa_serve.server.admission import Admission
from tests.fake_runner import DEPTHS
from tests.scripted_engine import Bench
from tests.server_fakes import FakeEngine, events, fake_server

HI = [{"role": "user", "content": "Hi"}]


@DEPTHS
def test_an_overdue_request_gets_one_final_output_that_says_why(depth: int) -> None:
    bench = Bench({"slow": range(10, 60), "other": range(10, 60)}, depth=depth)
    bench.add("slow", max_tokens=40, timeout=6.5)
    bench.add("other", max_tokens=12)
    bench.drain()
    final = bench.final("slow")
    assert final.finish_reason is FinishReason.TIMEOUT
    assert final.error is not None
    assert "time-out of 6.5 s, after " in final.error
    assert 1 <= final.usage.completion_tokens < 8
    assert bench.final("other").finish_reason is FinishReason.LENGTH
    assert bench.engine.stats().num_finished["timeout"] == 1


def test_one_that_only_waited_ends_at_its_time_out_too() -> None:
    bench = Bench({f"r{i}": range(10, 60) for i in range(9)})
    for i in range(9):
        bench.add(f"r{i}", max_tokens=20, timeout=4.0 if i == 8 else None)
    bench.drain()
    final = bench.final("r8")
    assert final.finish_reason is FinishReason.TIMEOUT
    assert final.usage.completion_tokens == 0


class TimedOut(FakeEngine):
    """Gives one piece of its reply, then ends the request at its time-out."""

    async def _outputs(self, request: Any) -> Any:
        pieces = self._pieces(request)
        if request.stream:
            yield pieces[0]
        yield RequestOutput(
            request_id=request.request_id,
            finish_reason=FinishReason.TIMEOUT,
            error="the request was ended at its time-out of 2 s, after 1 tokens",
        )


async def ask(**fields: Any) -> tuple[Any, FakeEngine]:
    async with fake_server() as server:
        server.engine.__class__ = TimedOut
        return await server.chat(messages=HI, **fields), server.engine


def test_a_time_out_is_a_408_with_its_own_code() -> None:
    response, _ = asyncio.run(ask(timeout_ms=2000))
    assert response.status_code == 408
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "time-out of 2 s" in error["message"]


def test_a_time_out_within_a_stream_is_its_last_event() -> None:
    response, _ = asyncio.run(ask(stream=True))
    found = events(response)
    assert found[-1]["error"]["code"] == "request_timeout"
    assert "choices" in found[0]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_deadline_time_out_and_priority_reach_the_engine(path: str) -> None:
    async def post() -> Any:
        async with fake_server() as server:
            body = {"messages": HI} if "chat" in path else {"prompt": "Hi"}
            wishes = {"deadline_ms": 1500, "timeout_ms": 60_000, "priority": -2}
            assert (await server.post(path, {**body, **wishes})).status_code == 200
            return server.engine.requests[0]

    request = asyncio.run(post())
    assert (request.deadline, request.timeout, request.priority) == (1.5, 60.0, -2)


@pytest.mark.parametrize("value", [0, -1, 1.5, "5", 10**12])
@pytest.mark.parametrize("name", ["deadline_ms", "timeout_ms"])
def test_times_must_be_whole_milliseconds_within_a_week(name: str, value: Any) -> None:
    response, _ = asyncio.run(ask(**{name: value}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_a_full_server_tells_the_engines_estimate_of_when_to_come_again() -> None:
    class Entry:
        num_requests, num_tokens = 1, 10

        def end(self, error: Exception) -> None:
            raise AssertionError("nobody ends it")

    async def refused() -> Overloaded:
        admission = Admission(max_requests=1, max_tokens=100)
        admission.enter(Entry(), 7)
        with pytest.raises(Overloaded) as e:
            admission.enter(Entry(), 23)
        return e.value

    assert asyncio.run(refused()).retry_after == 23


def test_flags_name_the_policy_and_the_time_out() -> None:
    config = EngineConfig.from_flags(scheduling_policy="deadline", request_timeout=90)
    assert (config.schedule.policy, config.schedule.request_timeout) == (Policy.DEADLINE, 90.0)
    with pytest.raises(ConfigError, match=r"--request-timeout must be more than 0 seconds, not -1"):
        EngineConfig.from_flags(request_timeout=-1.0)
