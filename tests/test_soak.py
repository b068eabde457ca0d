"""The soak's own judgement: what it asks, what it calls growth, and what it calls a fault."""

from __future__ import annotations

import asyncio
import random

import pytest

from nsa_serve.bench.front_end_load import Load, Reader, figures
from nsa_serve.bench.fuzz_api import summary
from nsa_serve.bench.pressure import Work, oversubscribed
from nsa_serve.bench.simulated import H200_8B, SimulatedEngine
from nsa_serve.bench.soak import Connection, Plan, Record, ask, faults, growth, metrics
from nsa_serve.errors import ConfigError

CLEAN = {
    "wrong": [], "left_over": {"num_requests_running": 0.0}, "choices_accepted": 3,
    "choices_ended": 3, "server_growth": 0.019, "engine_growth": -0.1,
}  # fmt: skip


def test_growth_is_of_the_end_over_what_came_after_the_warm_up():
    assert growth([50] * 25 + [100] * 65 + [103] * 10) == pytest.approx(0.03)
    assert growth([7]) == 0


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("wrong", ["status 500"], "status 500"),
        ("left_over", {"num_requests_running": 1.0}, "left over"),
        ("choices_ended", 2, "of 3 2 ended"),
        ("server_growth", 0.021, "server_growth 2.1%"),
    ],
)
def test_each_fault_is_told_and_a_clean_run_has_none(field, value, told):
    assert faults(CLEAN) == []
    (found,) = faults({**CLEAN, field: value})
    assert told in found


def test_the_load_is_mixed():
    chance = random.Random(0)
    plans = [Plan.draw(chance, 8) for _ in range(1000)]
    assert {plan.path for plan in plans} == {"/v1/completions", "/v1/chat/completions"}
    assert {plan.body["stream"] for plan in plans} == {True, False}
    assert 5 < sum(plan.body["temperature"] < 0 for plan in plans) < 50
    assert 50 < sum(plan.leave_after is not None for plan in plans) < 150
    assert {plan.body["max_tokens"] for plan in plans} == set(range(1, 9))


def asked_of(answer, plan):
    """(how the request ended, choices that were counted) at a server that answers so."""

    async def scenario():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            connection = Connection(server.sockets[0].getsockname()[1])
            record = Record()
            end = await ask(connection, plan, record)
            connection.close()
            return end, record.num_choices

    return asyncio.run(scenario())


def plan(stream, *, n=1, temperature=0.0, leave_after=None):
    body = {"stream": stream, "n": n, "temperature": temperature}
    return Plan("/v1/completions", body, leave_after)


def whole(status, body):
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def chunked(*pieces):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (*pieces, b""))


TOKEN, DONE, ERROR = b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n", b'data: {"error":{}}\n\n'


@pytest.mark.parametrize(
    ("answer", "asked", "end", "counted"),
    [
        (whole(200, b'{"choices":[1,2]}'), plan(False, n=2), "done", 2),
        (whole(200, b'{"choices":[1]}'), plan(False, n=2), "1 choices", 2),
        (chunked(TOKEN, DONE), plan(True), "done", 1),
        (chunked(TOKEN), plan(True), "a stream ended", 1),
        (chunked(ERROR, DONE), plan(True), "a stream ended", 1),
        (chunked(TOKEN, TOKEN, DONE), plan(True, leave_after=0), "left", 1),
        (whole(400, b"{}"), plan(False, temperature=-1), "refused", 0),
        (whole(400, b"{}"), plan(False), "status 400", 0),
        (whole(503, b"{}"), plan(True), "refused", 0),
    ],
)
def test_an_answer_is_judged_by_what_was_asked(answer, asked, end, counted):
    found = asked_of(answer, asked)
    assert found[0].startswith(end)
    assert found[1] == counted


def test_metrics_are_summed_over_their_labels():
    page = b'# HELP a\nx:ends{reason="stop"} 2.0\nx:ends{reason="length"} 3\nx:held{} 0.5\n'

    async def scenario():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + page)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await metrics(server.sockets[0].getsockname()[1])

    found = asyncio.run(scenario())
    assert (found["ends"], found["held"], found["nothing"]) == (5.0, 0.5, 0.0)


def test_latency_is_what_follows_the_moment_at_which_a_token_was_made():
    load = Load(num_streams=1, rate=10.0, seconds=1.0)

    async def scenario():
        reader = Reader(b"", load)
        reader.arrivals = [(5.01, 1), (5.13, 2), (7.05, 1)]
        reader.tail = b'"completion_tokens":%d,' % load.num_tokens
        found = figures([reader], load, 5.0, 6.0, busy=0.5)
        reader.tail = b'"completion_tokens":1,'
        with pytest.raises(AssertionError, match="ended with"):
            figures([reader], load, 5.0, 6.0, busy=0.5)
        return found

    found = asyncio.run(scenario())
    assert found["events_per_s"] == 3
    assert found["events_per_core_second"] == 6
    assert found["added_latency_ms"]["p50"] == pytest.approx(30)
    assert found["added_latency_ms"]["max"] == pytest.approx(30)


def test_a_load_of_too_few_requests_to_press_the_cache_is_refused():
    engine = SimulatedEngine(H200_8B, num_blocks=100, token_budget=512)
    work = Work(num_requests=29, prompt_len=32, output_len=32, knows=True)
    with pytest.raises(ConfigError, match="at least 375, not 29"):
        oversubscribed(engine, work, 3.0)
    assert oversubscribed(engine, work, 0.2).num_open == 20


def test_the_end_of_schemathesis_is_read_and_one_without_figures_is_an_error():
    text = "Tested: 12\n ... 3456 generated, 2 found 2 unique failures"
    assert summary(text) == {"routes": 12, "cases": 3456, "failures": 2}
    with pytest.raises(ValueError, match="did not come to its end"):
        summary("Traceback")
