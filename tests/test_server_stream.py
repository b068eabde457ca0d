"""What happens to a stream: silence, a client that leaves, shutdown; and to the queue behind it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json

import pytest

from nsa_serve.errors import EngineDead, Overloaded
from nsa_serve.request import EngineRequest, RequestOutput, SamplingParams
from nsa_serve.server import replies
from nsa_serve.server.admission import Admission
from nsa_serve.server.chat import ChatShape
from nsa_serve.server.completions import CompletionShape
from nsa_serve.server.generation import Generation
from nsa_serve.server.http_protocol import BODY_WRITER
from nsa_serve.server.prometheus import Metrics
from nsa_serve.server.recent import Recent
from tests.server_fakes import FakeEngine, events, fake_server
from tests.virtual_time import run_virtually

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


class RawClient:
    """A client at the level of ASGI, which sees each piece as it is sent and can leave."""

    def __init__(self, app, body=BODY, writer=None):
        self._app = app
        self._writer = writer
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.sent = asyncio.Queue()
        self.begun = False  # the head of the answer has come
        self.task = asyncio.create_task(self._app(self._scope(), self._incoming.get, self._take))

    async def _take(self, message):
        self.begun = True
        self.sent.put_nowait(message)

    def _scope(self):
        path = "/v1/chat/completions"
        extensions = {} if self._writer is None else {BODY_WRITER: self._writer}
        return {
            "extensions": extensions,
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("server", 80), "client": ("client", 1),
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip

    def leave(self):
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def text(self):
        """The next piece of the body."""
        while True:
            message = await self.sent.get()
            if message["type"] == "http.response.body":
                return message["body"].decode()

    async def until(self, found):
        """Text up to and with the piece that has ``found``."""
        text = ""
        while found not in text:
            text += await self.text()
        return text


async def _settled(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def _app(server):
    return server.client._transport.app


class Written:
    """A writer past the layers, into what the client is sent; ``readiness`` at each look."""

    def __init__(self, readiness):
        self._readiness = iter(readiness)
        self.client = None
        self.pieces = []
        self.fails_at = None

    @property
    def ready(self):
        return self.client.begun and next(self._readiness)

    def write(self, piece):
        if len(self.pieces) == self.fails_at:
            raise RuntimeError("no such thing at /srv")
        self.pieces.append(piece)
        self.client.sent.put_nowait({"type": "http.response.body", "body": piece})


def _written_through(writer, reply):
    async def scenario():
        async with fake_server() as server:
            server.engine.reply = reply
            writer.client = RawClient(_app(server), writer=writer)
            text = await writer.client.until("[DONE]")
            await writer.client.task
            return text, server.services.admission.num_open

    return asyncio.run(scenario())


def _content(text):
    lines = [line for line in text.split("\n\n") if line.startswith("data: {")]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize(
    ("readiness", "some"),
    [
        (itertools.repeat(True), True),
        (itertools.cycle([True, False, False]), True),
        (itertools.repeat(False), False),
    ],
    ids=["always", "now and then", "never"],
)
def test_a_stream_is_whole_and_in_order_however_much_is_written_at_once(readiness, some):
    reply = "".join(chr(ord("a") + i % 26) for i in range(300))
    writer = Written(readiness)
    text, num_open = _written_through(writer, reply)
    assert _content(text) == reply
    assert num_open == 0
    assert bool(writer.pieces) == some


def test_a_piece_that_can_not_be_written_at_once_ends_its_stream_with_an_error():
    writer = Written(itertools.repeat(True))
    writer.fails_at = 3
    text, num_open = _written_through(writer, "Hello, you there")
    assert '"code":"internal_error"' in text
    assert "/srv" not in text
    assert num_open == 0


def test_silence_is_counted_from_the_last_output_that_was_written_through():
    class Steady(FakeEngine):
        async def submit(self, request, sink=None):
            for _ in range(5):
                await asyncio.sleep(6)
                assert sink(RequestOutput(request_id=request.request_id, token_ids=[1]))
            await asyncio.Event().wait()
            yield

    async def scenario(clock):
        request = EngineRequest(
            request_id="a", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=9)
        )
        generation = Generation(
            Steady(), [request],
            admission=Admission(max_requests=1, max_tokens=1), metrics=Metrics("test", "m"),
            recent=Recent(), receive=asyncio.Queue().get,
        )  # fmt: skip
        written = []
        generation.write_through = lambda index, output: not written.append(output)
        async with generation:
            start = clock()
            return await generation.arrivals(10), clock() - start, len(written)

    assert run_virtually(scenario) == ([], 5 * 6 + 10, 5)


def test_silence_is_filled_with_comments():
    async def scenario():
        async with fake_server(keep_alive=0.01) as server:
            server.engine.gate.clear()
            client = RawClient(_app(server))
            before = await client.until(": keep-alive\n\n")
            server.engine.gate.set()
            return before + await client.until("[DONE]")

    text = asyncio.run(scenario())
    pieces = text.split("\n\n")
    assert '"role":"assistant"' in pieces[0]
    assert ": keep-alive" in pieces
    assert pieces[-2] == "data: [DONE]"


def test_a_long_prefill_sends_headers_and_comments_before_any_token():
    async def scenario():
        async with fake_server(keep_alive=0.01) as server:
            server.engine.reply = "x"
            server.engine.gate.clear()
            client = RawClient(_app(server))
            start = await client.sent.get()
            first = await client.text()
            server.engine.gate.set()
            await client.until("[DONE]")
            return start, first

    start, first = asyncio.run(scenario())
    assert start["status"] == 200
    assert dict(start["headers"])[b"cache-control"] == b"no-cache"
    assert first == ": keep-alive\n\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_all_its_choices(stream):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "n": 2}

    async def scenario():
        async with fake_server() as server:
            server.engine.gate.clear()
            client = RawClient(_app(server), json.dumps(body).encode())
            await _settled(lambda: len(server.engine.requests) == 2)
            client.leave()
            await client.task
            assert server.services.admission.num_open == 0
            return server.engine

    engine = asyncio.run(scenario())
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


def test_a_finished_request_is_not_aborted():
    async def scenario():
        async with fake_server() as server:
            await server.chat(stream=True)
            await server.chat()
            return server.engine.aborted

    assert asyncio.run(scenario()) == []


def test_a_drain_waits_for_what_runs_and_lets_nothing_in():
    async def scenario():
        async with fake_server() as server:
            server.engine.gate.clear()
            running = asyncio.create_task(server.chat(stream=True))
            await _settled(lambda: server.services.admission.num_open == 1)
            draining = asyncio.create_task(server.services.admission.drain(60))
            await asyncio.sleep(0)
            refused = await server.chat()
            ready = await server.client.get("/ready")
            health = await server.client.get("/health")
            server.engine.gate.set()
            await draining
            return await running, refused, ready, health

    running, refused, ready, health = asyncio.run(scenario())
    assert events(running)[-1]["choices"][0]["finish_reason"] == "stop"
    assert (refused.status_code, ready.status_code, health.status_code) == (503, 503, 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_drain_that_takes_too_long_ends_what_is_left_with_an_error(stream):
    async def scenario():
        async with fake_server() as server:
            server.engine.gate.clear()
            running = asyncio.create_task(server.chat(stream=stream))
            await _settled(lambda: server.engine.requests)
            await asyncio.sleep(0.01)
            await server.services.admission.drain(0.01)
            return await running, server.engine.aborted

    response, aborted = asyncio.run(scenario())
    error = events(response)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 503)
    assert (error["code"], len(aborted)) == ("overloaded", 1)


def test_when_the_engine_dies_open_streams_get_an_error():
    async def scenario():
        async with fake_server() as server:
            server.engine.gate.clear()
            client = RawClient(_app(server))
            await client.until('"content":"H"')
            await server.services.admission.end_all(EngineDead("killed at /srv"))
            return await client.until("[DONE]")

    text = asyncio.run(scenario())
    assert '"code":"engine_dead"' in text
    assert "/srv" not in text


class Entry:
    def __init__(self, num_requests=1, num_tokens=10):
        self.num_requests = num_requests
        self.num_tokens = num_tokens

    def end(self, error):
        raise AssertionError("not ended here")


def test_admission_counts_requests_and_tokens_back():
    async def scenario():
        admission = Admission(max_requests=2, max_tokens=100)
        first, second = Entry(), Entry()
        admission.enter(first)
        admission.enter(second)
        with pytest.raises(Overloaded) as caught:
            admission.enter(Entry())
        admission.leave(first)
        admission.enter(Entry(num_tokens=90))
        with pytest.raises(Overloaded):
            admission.enter(Entry(num_tokens=1))
        return caught.value.retry_after

    assert asyncio.run(scenario()) > 0


def test_a_request_larger_than_the_limit_is_let_in_alone():
    async def scenario():
        admission = Admission(max_requests=2, max_tokens=100)
        admission.enter(Entry(num_requests=128, num_tokens=1000))
        return admission.num_open

    assert asyncio.run(scenario()) == 1


def test_an_idle_server_drains_at_once():
    async def scenario():
        await Admission(max_requests=1, max_tokens=1).drain(60)

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_many_streams_at_once_are_all_whole():
    async def scenario():
        async with fake_server() as server:
            return await asyncio.gather(*(server.chat(stream=True) for _ in range(64)))

    for response in asyncio.run(scenario()):
        chunks = events(response)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hi é!"


def test_a_client_that_leaves_before_the_body_is_whole_starts_nothing():
    async def scenario():
        async with fake_server() as server:
            client = RawClient(_app(server))
            client._incoming.get_nowait()
            client._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
            client.leave()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.task, 5)
            return server.engine.requests, client.sent.get_nowait()["status"]

    assert asyncio.run(scenario()) == ([], 400)


@pytest.mark.parametrize(
    "text",
    ["", "é€\U0001f600", '"quoted" \\ / </script>', "".join(map(chr, range(32))), "\x7f\u2028"],
)
def test_chunks_word_a_text_as_whole_answers_do(text):
    choice = replies.CompletionChunkChoice(0, text, None, None)
    chunk = replies.CompletionChunk("c", "text_completion", 1, "m", [choice])
    whole = replies.DetokenizeReply(prompt=text).to_json().removeprefix('{"prompt":')
    assert f'"text":{whole[:-1]},' in chunk.to_json()


FIELDS = [
    {}, {"n": 2}, {"stream_options": {"include_usage": True}}, {"model": "the text"},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"logprobs": 1}, {"echo": True}, {"nsa_trace": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_event_that_was_worded_once_is_what_its_chunk_says(monkeypatch, path, fields):
    chat = path.endswith("chat/completions")
    if chat and ("echo" in fields or "logprobs" in fields):
        fields = {"logprobs": True, "top_logprobs": 1}
    asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}

    def ask():
        async def scenario():
            async with fake_server(model_names=("fake", "the text")) as server:
                server.engine.reply = 'He said "the text" \\ é\n\x01\u2028 and left'
                return events(await server.post(path, {**asked, **fields, "stream": True}))

        return [{**chunk, "id": "", "created": 0} for chunk in asyncio.run(scenario())]

    quick = ask()
    shape = ChatShape if chat else CompletionShape
    monkeypatch.setattr(shape, "text_chunk", lambda self, index, text: None)
    assert quick == ask()


def test_plain_text_is_worded_as_chunks_at_its_ends_only(monkeypatch):
    worded = []
    chunks = ChatShape.chunks

    def counted(self, index, output):
        worded.append(output.text)
        return chunks(self, index, output)

    async def scenario():
        async with fake_server() as server:
            server.engine.reply = "Hello"
            return events(await server.chat(stream=True))

    monkeypatch.setattr(ChatShape, "chunks", counted)
    assert len(asyncio.run(scenario())) == 6
    assert worded == ["H", "o"]


def test_a_chunk_has_the_fields_that_were_set_and_no_others():
    call = replies.DeltaCall(index=0, function=replies.CalledFunction(arguments="{}"))
    choice = replies.ChatChunkChoice(0, replies.Delta(tool_calls=[call]), None, None)
    chunk = replies.ChatChunk("c", "chat.completion.chunk", 1, "m", [choice], usage=None)
    assert json.loads(chunk.to_json()) == {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        "usage": None,
    }


def test_gaps_between_tokens_are_counted_in_the_first_bucket_that_holds_them():
    metrics = Metrics("p", "m")
    metrics.observe_gap(0.02, 10)  # ten tokens at 2 ms, a bound that belongs to its bucket
    metrics.observe_gap(500.0, 1)
    snapshot = asyncio.run(FakeEngine().stats())
    lines = set(metrics.page(snapshot, num_rejected=0).decode().splitlines())
    name = "p:inter_token_latency_seconds"
    for bound, count in (("0.001", 0), ("0.002", 10), ("0.004", 10), ("80.0", 10), ("+Inf", 11)):
        assert f'{name}_bucket{{le="{bound}",model_name="m"}} {count}.0' in lines
    assert f'{name}_sum{{model_name="m"}} 500.02' in lines
