"""The load test's client: events cut anywhere, connections, and what each answer is read as."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.bench.load.cli import run_async
from nsa_serve.bench.load.endpoint import CHAT, Endpoint, StreamReader
from nsa_serve.bench.load.events import EventParser
from nsa_serve.bench.load.http import HTTPClient
from nsa_serve.bench.load.outcome import Outcome, Session, Turn
from tests.scripted_api import MODEL, Answer, ScriptedAPI
from tests.virtual_time import run_virtually

STREAM = (
    'data: {"a": "é"}\r\n\r\n: keep-alive\n\n\n'
    "data:x\ndata: y\nid: 3\n\nevent: z\n\ndata: [DONE]\n\n"
).encode()
EVENTS = ['{"a": "é"}'.encode(), b"x\ny", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_the_stream_is_cut(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    pieces = [STREAM[a:b] for a, b in pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_event_is_handed_out_with_its_last_byte_and_not_before():
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def ask(api, *, session=None, path="/v1/completions", times=1, timeout=100.0):
    """The outcomes of one session's first turn, asked ``times`` times in turn."""

    async def scenario(clock):
        client = HTTPClient("http://server/v1", {}, clock=clock, connect=api.connect)
        endpoint = Endpoint(client, MODEL, clock, path, {"top_k": 1}, timeout)
        found = []
        for _ in range(times):
            asked = session or Session((Turn("hello", 4),))
            outcome = Outcome(asked.turns[0], due=clock(), sent=clock())
            await endpoint.send(asked, [], outcome)
            found.append(outcome)
        client.close()
        await api.close()
        return found

    return run_virtually(scenario)


def test_an_answer_is_timed_by_its_chunks():
    (outcome,) = ask(ScriptedAPI(lambda number, body: Answer([0.5, 0.1, 0.2, 0.1])))
    assert outcome.success, outcome.error
    assert outcome.ttft == pytest.approx(0.5)
    assert outcome.itls == pytest.approx([0.1, 0.2, 0.1])
    assert outcome.latency == pytest.approx(0.9)
    assert outcome.tpot == pytest.approx(0.4 / 3)
    assert (outcome.input_len, outcome.output_len, outcome.text) == (5, 4, " w" * 4)


def test_the_role_chunk_of_a_chat_is_no_first_token():
    api = ScriptedAPI(lambda number, body: Answer([2.0, 1.0], cached=3))
    (outcome,) = ask(api, path=CHAT)
    assert (outcome.ttft, outcome.itls) == (pytest.approx(2.0), pytest.approx([1.0]))
    assert outcome.cached_tokens == 3
    (body,) = api.bodies
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["max_completion_tokens"], body["top_k"], body["stream"]) == (4, 1, True)


def test_connections_are_used_again_one_after_the_other():
    api = ScriptedAPI(lambda number, body: Answer([0.1]))
    assert all(outcome.success for outcome in ask(api, times=3))
    assert api.num_connections == 1


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer([], status=503, message="the queue is full"), "HTTP 503: the queue is full"),
        (Answer([0.1] * 3, error_after=1, message="died"), "error event: died"),
        (Answer([0.1] * 3, cut_after=2), "the connection closed before the answer ended"),
        (Answer([0.1, 500.0]), "no whole answer within 100 s"),
        (Answer([]), "without a token"),
    ],
)
def test_what_goes_wrong_is_told_and_never_a_success(answer, found):
    (outcome,) = ask(ScriptedAPI(lambda number, body: answer))
    assert found in outcome.error
    assert not outcome.success


def test_without_usage_chunks_are_counted_and_lengths_are_the_datasets():
    session = Session((Turn("hello", 4, prompt_len=77),))
    api = ScriptedAPI(lambda number, body: Answer([0.1] * 4, usage=False))
    (outcome,) = ask(api, session=session)
    assert (outcome.input_len, outcome.output_len) == (77, 4)


def test_messages_need_the_chat_endpoint():
    session = Session((Turn(({"role": "user", "content": "hi"},), 4),))
    (refused,) = ask(ScriptedAPI(lambda number, body: Answer([0.1])), session=session)
    assert "--backend openai-chat" in refused.error
    (outcome,) = ask(ScriptedAPI(lambda n, body: Answer([0.1])), session=session, path=CHAT)
    assert outcome.success


def read(*events):
    outcome = Outcome(Turn("", 1), due=0.0, sent=0.0)
    reader = StreamReader(outcome, is_chat=True)
    for now, event in enumerate(events):
        reader.feed(f"data: {json.dumps(event)}\n\n".encode(), float(now))
    return outcome, reader.verdict()


def chunk(reason=None, **delta):
    return {"choices": [{"delta": delta, "finish_reason": reason}]}


def test_reasoning_and_tool_calls_are_tokens_and_a_bare_end_is_none():
    outcome, verdict = read(
        chunk(role="assistant", content=""),
        chunk(reasoning_content="hm"),
        chunk(tool_calls=[{"index": 0}]),
        chunk(content=""),
        chunk(reason="stop"),
    )
    assert (outcome.token_times, outcome.end, verdict) == ([1.0, 2.0, 3.0], 4.0, "")


def test_a_stream_that_stops_in_the_middle_is_no_success():
    assert "in the middle" in read(chunk(content="a"))[1]


def test_an_event_that_is_no_json_is_an_error():
    outcome = Outcome(Turn("", 1), due=0.0, sent=0.0)
    StreamReader(outcome, is_chat=False).feed(b"data: {oops\n\n", 1.0)
    assert "no JSON object" in outcome.error


class RawServer:
    """Sends the same bytes to every request and then closes, or waits for the next."""

    def __init__(self, answers, closes):
        self.answers, self.closes, self.tasks = list(answers), closes, []

    async def connect(self, protocol):
        api = ScriptedAPI(lambda number, body: Answer([]))
        api._serve = self._serve
        await api.connect(protocol)
        self.tasks += api._tasks

    async def _serve(self, reader, writer):
        while self.answers and await reader.read(65536):
            writer.write(self.answers.pop(0))
            await writer.drain()
            if self.closes:
                break
        writer.close()


def fetch(server, times=1):
    async def scenario(clock):
        client = HTTPClient("http://server", {}, clock=clock, connect=server.connect)
        try:
            return [await client.exchange("GET", "/x") for _ in range(times)]
        finally:
            client.close()
            await asyncio.gather(*server.tasks)

    return run_virtually(scenario)


def test_a_body_without_a_length_ends_with_its_connection():
    (reply,) = fetch(RawServer([b"HTTP/1.1 200 OK\r\n\r\nabc"], closes=True))
    assert reply.body == b"abc"


def test_a_body_cut_short_is_an_error():
    with pytest.raises(ConnectionError, match="before the answer ended"):
        fetch(RawServer([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"], closes=True))


def test_what_is_no_http_is_an_error():
    with pytest.raises(ConnectionError, match="no HTTP"):
        fetch(RawServer([b"SSH-2.0\r\n\r\n"], closes=False))


def test_an_idle_connection_that_the_server_closed_is_replaced():
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1"
    replies = fetch(RawServer([answer, answer], closes=True), times=2)
    assert [reply.body for reply in replies] == [b"1", b"1"]


@pytest.mark.parametrize("url", ["server:8000", "ftp://server", "http://"])
def test_an_address_must_be_http(url):
    with pytest.raises(ValueError, match="no http"):
        HTTPClient(url, {}, clock=lambda: 0.0)


def test_a_server_is_reached_over_tcp_on_the_loop_that_the_command_uses():
    api = ScriptedAPI(lambda number, body: Answer([0.0] * 3))

    async def scenario(clock, connect):
        listener = await asyncio.start_server(api._serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        client = HTTPClient(f"http://127.0.0.1:{port}/v1", {}, clock=clock, connect=connect)
        outcomes = [Outcome(Turn("hello", 3), due=clock(), sent=clock()) for _ in range(20)]
        endpoint = Endpoint(client, MODEL, clock)
        session = Session((Turn("hello", 3),))
        await asyncio.gather(*(endpoint.send(session, [], outcome) for outcome in outcomes))
        client.close()
        listener.close()
        return outcomes

    outcomes = run_async(scenario)
    assert [outcome.error for outcome in outcomes] == [""] * 20
    assert {outcome.output_len for outcome in outcomes} == {3}
    assert all(0 < outcome.ttft <= outcome.latency for outcome in outcomes)
