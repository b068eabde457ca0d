"""What is told of requests: an id, a line of the log, spans; and that no text of theirs is."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import types

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nsa_serve.request import FinishReason, RequestOutput, RequestTimes, Usage
from nsa_serve.server import request_log as log_room
from nsa_serve.server import serve as serve_room
from nsa_serve.server.flags import ServeFlags
from nsa_serve.server.log_format import JsonFormatter
from nsa_serve.server.request_log import EndedRequest
from nsa_serve.server.tracing import SpanRecorder
from tests.server_fakes import fake_server

SECRET = "the secret of the prompt"


def ask(path="/v1/chat/completions", *, headers=None, body=None, **settings):
    async def scenario():
        async with fake_server(**settings) as server:
            if body is None:
                return await server.client.get(path, headers=headers)
            return await server.post(path, body, headers=headers)

    return asyncio.run(scenario())


def chat(**fields):
    return {"messages": [{"role": "user", "content": SECRET}], **fields}


@pytest.mark.parametrize("path", ["/health", "/version", "/nowhere"])
def test_the_clients_id_is_echoed_whatever_the_answer(path):
    response = ask(path, headers={"x-request-id": "trace-7:a/b=c"})
    assert response.headers["x-request-id"] == "trace-7:a/b=c"


@pytest.mark.parametrize("sent", [None, "", "two words", "x" * 129, "a\tb"])
def test_an_id_is_made_where_none_can_be_used(sent):
    headers = None if sent is None else {"x-request-id": sent}
    response = ask("/version", headers=headers)
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_key_and_a_stream_have_ids_too(stream):
    response = ask(body=chat(stream=stream), headers={"x-request-id": "mine"})
    refused = ask("/version", headers={"x-request-id": "mine"}, api_keys=("k",))
    assert (response.headers["x-request-id"], refused.headers["x-request-id"]) == ("mine", "mine")
    assert (response.status_code, refused.status_code) == (200, 401)


def records(caplog):
    return [record for record in caplog.records if record.name == "nsa_serve.access"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_line_with_its_account_and_without_its_text(caplog, stream):
    with caplog.at_level(logging.INFO):
        ask(body=chat(stream=stream, n=2), headers={"x-request-id": "id-9"})
    (record,) = records(caplog)
    fields = record.fields
    assert fields.pop("seconds") >= 0
    assert fields.pop("answer_id").startswith("chatcmpl-")
    assert fields == {
        "request_id": "id-9", "method": "POST", "path": "/v1/chat/completions", "status": 200,
        "prompt_tokens": 2 * 41, "generated_tokens": 12, "finish_reasons": ["stop", "stop"],
    }  # fmt: skip
    assert "s, 82 + 12 tokens, id-9, chatcmpl-" in record.getMessage()
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat()),
        ("/v1/completions", {"prompt": SECRET}),
        ("/v1/responses", {"input": SECRET}),
    ],
)
def test_the_log_joins_the_answers_id_and_the_one_in_its_header(caplog, path, body):
    with caplog.at_level(logging.INFO):
        response = ask(path, body=body)
    (record,) = records(caplog)
    ids = response.headers["x-request-id"], response.json()["id"]
    assert (record.fields["request_id"], record.fields["answer_id"]) == ids
    assert record.getMessage().endswith(f", {ids[0]}, {ids[1]}")


REFUSED = {
    "a wrong value": ({"temperature": SECRET}, {}, 400, "invalid parameter (temperature)"),
    "a wrong part": (
        {"messages": [{"role": SECRET, "content": SECRET}]}, {}, 400,
        "invalid parameter (messages[0])",
    ),
    "a wrong value of the client's own key": (
        {"logit_bias": {SECRET: SECRET}}, {}, 400, "invalid parameter (logit_bias)",
    ),
    "another model": ({"model": SECRET}, {}, 404, "model not found (model)"),
    "a template that refuses": (
        {"chat_template_kwargs": {"refuse": SECRET}}, {}, 400, "template error (messages)",
    ),
    "a long prompt": (
        {}, {"max_model_len": 8}, 400, "This model's maximum context length is 8 tokens",
    ),
    "a large body": ({}, {"body_bytes": 8}, 413, "the body is larger than 8 bytes"),
    "no key": ({}, {"api_keys": ("k",)}, 401, "send a valid key as 'Authorization: Bearer KEY'"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "settings", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_request_leaves_one_line_with_its_reason_that_does_not_echo_it(
    caplog, fields, settings, status, reason
):
    with caplog.at_level(logging.DEBUG):
        ask(body=chat(**fields), **settings)
    (record,) = records(caplog)
    assert record.fields["status"] == status
    assert record.fields["reason"].startswith(reason)
    assert f" s, {reason}" in record.getMessage()
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("text/plain", SECRET, "content-type must be application/json, not 'text/plain'"),
        ("application/json", f"{{{SECRET}", "the body is not valid JSON: key must be a string"),
        ("application/json", f"{SECRET}\xff".encode("latin-1"), "the body is not valid UTF-8"),
        ("application/json", f'["{SECRET}"]', "invalid parameter"),
    ],
)
def test_a_body_that_can_not_be_read_leaves_the_reason_and_none_of_its_text(
    caplog, kind, body, reason
):
    async def scenario():
        async with fake_server() as server:
            headers = {"content-type": kind}
            await server.client.post("/v1/completions", content=body, headers=headers)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    (record,) = records(caplog)
    assert record.fields["reason"].startswith(reason)
    assert SECRET not in caplog.text


def test_a_server_that_drains_or_is_full_says_so_in_the_log(caplog):
    async def scenario():
        async with fake_server(max_open_tokens=1) as server:
            server.engine.gate.clear()
            first = asyncio.create_task(server.chat())
            while not server.engine.requests:
                await asyncio.sleep(0)
            assert (await server.chat()).status_code == 503
            server.engine.gate.set()
            await first
            server.services.admission.draining = True
            assert (await server.chat()).status_code == 503

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    full, _, draining = (record.fields.get("reason") for record in records(caplog))
    assert full.startswith("the queue is full: 1 requests")
    assert draining == "the server is shutting down"


def test_a_stream_that_fails_in_its_midst_has_the_reason_in_its_line(caplog):
    async def scenario():
        async with fake_server() as server:
            server.engine.error_after = 2
            await server.chat(stream=True)

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    (record,) = records(caplog)
    assert (record.fields["status"], record.fields["reason"]) == (
        200, "the engine failed at this request",
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log_room, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_flood_of_refusals_leaves_few_lines_and_a_count_and_hides_no_other_status(caplog, clock):
    async def scenario():
        async with fake_server() as server:
            for _ in range(log_room.MAX_REFUSED + 7):
                await server.chat(n=0)
            await server.client.get("/nowhere")
            await server.chat()
            clock[0] += log_room.REFUSED_SECONDS
            await server.client.get("/health")
            await server.chat(n=0)

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    *lines, count, last = records(caplog)
    statuses = [record.fields["status"] for record in lines]
    assert statuses == [400] * log_room.MAX_REFUSED + [404, 200]
    assert count.getMessage() == "7 more requests were refused with 400"
    assert last.fields["status"] == 400


def test_a_client_that_leaves_is_told_of_whatever_the_answer_had_begun_with(caplog):
    body = json.dumps(chat(stream=True)).encode()
    incoming = [{"type": "http.request", "body": body}]

    async def scenario():
        async with fake_server() as server:
            server.engine.gate.clear()
            begun = asyncio.Event()
            statuses = []

            async def receive():
                if incoming:
                    return incoming.pop()
                await begun.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                statuses.append(message.get("status"))
                begun.set()

            headers = [(b"content-type", b"application/json")]
            scope = {
                "type": "http", "method": "POST", "path": "/v1/chat/completions",
                "headers": headers, "query_string": b"", "asgi": {"version": "3.0"},
            }  # fmt: skip
            await server.client._transport.app(scope, receive, send)
            return statuses[0]

    with caplog.at_level(logging.INFO):
        assert asyncio.run(scenario()) == 200
    (record,) = records(caplog)
    assert record.fields["status"] == 499
    assert "/v1/chat/completions 499 in" in record.getMessage()


def test_probes_are_below_the_level_of_the_log(caplog):
    with caplog.at_level(logging.INFO):
        for path in ("/health", "/ready", "/metrics"):
            ask(path)
    assert not records(caplog)


def test_a_path_can_not_forge_a_line(caplog):
    with caplog.at_level(logging.INFO):
        ask("/a%0aERROR%20forged")
    (record,) = records(caplog)
    assert "\n" not in record.getMessage()


def test_the_json_log_has_an_object_a_line():
    record = logging.LogRecord("nsa_serve", logging.WARNING, "f", 1, "two\nlines %d", (7,), None)
    record.fields = {"request_id": "a"}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry.pop("time"))
    assert entry == {
        "level": "warning", "logger": "nsa_serve", "message": "two\nlines 7", "request_id": "a",
    }  # fmt: skip


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def recorder(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    recorder = SpanRecorder(provider, "fake")
    yield recorder
    recorder.close()


def traced(recorder, **request):
    async def scenario():
        async with fake_server(tracing=recorder) as server:
            return await server.post("/v1/chat/completions", chat(**request), headers=PARENT)

    return asyncio.run(scenario())


TRACE, PARENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{PARENT_SPAN}-01"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_queue_prefill_and_decode_below_it(recorder, exporter, stream):
    assert traced(recorder, stream=stream).status_code == 200
    *phases, whole = exporter.get_finished_spans()
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert {span.parent.span_id for span in phases} == {whole.context.span_id}
    seconds = [(span.end_time - span.start_time) / 1e9 for span in phases]
    assert seconds == pytest.approx([0.25, 0.75, 1.5], abs=1e-6)
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(phases))
    assert whole.attributes["gen_ai.usage.output_tokens"] == 6
    assert whole.attributes["gen_ai.response.id"].startswith("chatcmpl-")
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_span_continues_the_clients_trace(recorder, exporter):
    traced(recorder)
    whole = exporter.get_finished_spans()[-1]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT_SPAN


def test_no_text_is_in_a_span(recorder, exporter):
    traced(recorder)
    assert SECRET not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_a_request_that_never_ran_has_no_phases(recorder, exporter):
    times = RequestTimes(arrival=1.0, first_scheduled=None, first_token=None, last_token=None)
    final = RequestOutput(
        request_id="a", finish_reason=FinishReason.ABORT, usage=Usage(3, 0, 0), times=times
    )
    recorder.record(EndedRequest("a", "POST", "/v1/completions", 0, 1.0, 2.0, [final], {}))
    (whole,) = exporter.get_finished_spans()
    assert whole.status.status_code.name == "ERROR"


def test_without_an_endpoint_nothing_is_traced():
    assert serve_room._tracing(ServeFlags(), "m") is None
