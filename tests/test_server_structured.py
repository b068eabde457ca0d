"""Structured output over HTTP: what each field asks of the engine, and how a failure is worded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from nsa_serve.errors import InvalidParameter
from nsa_serve.request import GrammarKind, GrammarSpec
from nsa_serve.server.app import create_app
from nsa_serve.server.settings import ServerSettings
from tests.byte_grammars import VOCAB, GrammarBench
from tests.in_process import InProcessEngine
from tests.server_fakes import MODEL, events, fake_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}


def body(path: str, **fields: Any) -> dict[str, Any]:
    given = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    return {**given, **fields}


def spec_of(path: str, **fields: Any) -> GrammarSpec | None:
    """The grammar that the engine is given for these fields."""

    async def scenario() -> GrammarSpec | None:
        async with fake_server() as server:
            answer = await server.post(path, body(path, **fields))
            assert answer.status_code == 200, answer.text
            return server.engine.requests[0].sampling.grammar

    return asyncio.run(scenario())


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": json_schema(SCHEMA, strict=True)}, "json", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        ({"guided_json": SCHEMA}, "json", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ["a"]),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
    ],
)
def test_every_spelling_reaches_the_engine_as_one_grammar(path, fields, kind, value):
    spec = spec_of(path, **fields)
    assert spec is not None
    assert (spec.kind, spec.param) == (GrammarKind(kind), next(iter(fields)))
    found = json.loads(spec.text) if kind in ("json", "choice") else spec.text
    assert found == value
    if value is SCHEMA:
        assert spec.text.index('"b"') < spec.text.index('"a"'), "the order of keys is lost"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "disable_fallback": False}},
        {"structured_outputs": {"disable_any_whitespace": False}},
        {"structured_outputs": {"disable_additional_properties": False}},
        {"guided_json": None},
    ],
)
def test_what_asks_for_nothing_gives_no_grammar(fields):
    assert spec_of(CHAT, **fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": json_schema(3)}, "response_format.json_schema.schema"),
        ({"response_format": "json_object"}, "response_format"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs.yaml"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, param):
    async def scenario() -> httpx.Response:
        async with fake_server() as server:
            answer = await server.post(CHAT, body(CHAT, **fields))
            assert not server.engine.requests
            return answer

    answer = asyncio.run(scenario())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param), answer.text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
@pytest.mark.parametrize("name", ["disable_any_whitespace", "disable_additional_properties"])
@pytest.mark.parametrize("value", [0, 0.0, True, "false"])
def test_a_switch_that_must_be_off_takes_no_number_in_place_of_false(path, name, value):
    async def scenario() -> httpx.Response:
        async with fake_server() as server:
            asked = {"structured_outputs": {"json_object": True, name: value}, "input": "Hi"}
            return await server.post(path, body(path, **asked))

    answer = asyncio.run(scenario())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"structured_outputs.{name}", answer.text


@asynccontextmanager
async def byte_server() -> AsyncIterator[tuple[httpx.AsyncClient, GrammarBench]]:
    """A server over a real engine whose model says any bytes that it may."""
    bench = GrammarBench(clock=time.monotonic)
    settings = ServerSettings(model_names=(MODEL,), max_model_len=1024, vocab_size=VOCAB)
    app = create_app(InProcessEngine(bench.engine), bench.tokenizer, settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client, bench
    finally:
        app.state.services.workers.close()
    assert not bench.engine.has_work
    assert len(bench.followers) == 0


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"items": value}
    return value


WIDE = [{"anyOf": [{"properties": {f"{c}{i}": {}}} for c in "ab"]} for i in range(14)]
FAILURES = {
    "regex": ({"guided_regex": "(["}, "guided_regex", "unclosed character class"),
    "regex bomb": ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", "repetitions"),
    "pattern bomb": (
        {"guided_json": {"type": "string", "pattern": "(a{999}){999}"}}, "guided_json", "998001"
    ),
    "recursion": ({"response_format": json_schema({"$ref": "#"})}, "response_format", "NoExt"),
    "depth": ({"response_format": json_schema(nested(80))}, "response_format", "levels deep"),
    "schema bomb": ({"guided_json": {"allOf": WIDE}}, "guided_json", "too large"),
    "enum": (
        {"guided_json": {"enum": [f"value {i}" for i in range(9000)]}}, "guided_json", "bytes"
    ),
    "keyword": (
        {"response_format": json_schema({"not": {}})}, "response_format", 'keys: ["not"]'
    ),
    "type": ({"guided_json": {"type": "blob"}}, "guided_json", "blob"),
    "remote reference": ({"guided_json": {"$ref": "http://x/y"}}, "guided_json", "not fetch"),
    "grammar": ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
    "gbnf": ({"guided_grammar": "root ::= ((("}, "guided_grammar", "GBNF"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_each_failing_grammar_is_a_400_and_the_next_request_is_answered(stream):
    async def scenario() -> None:
        async with byte_server() as (client, _):
            for name, (fields, param, words) in FAILURES.items():
                asked = {"prompt": "x", "stream": stream, **fields}
                answer = await client.post(COMPLETIONS, json=asked)
                assert answer.status_code == 400, (name, answer.text)
                error = answer.json()["error"]
                assert error["param"] == param
                assert words in error["message"]
                assert len(answer.content) < 1500
                ordinary = {"prompt": "x", "guided_choice": [name], "max_tokens": 50}
                answer = await client.post(COMPLETIONS, json=ordinary)
                assert answer.json()["choices"][0]["text"] == name

    asyncio.run(scenario())


def test_every_choice_of_a_request_has_its_own_place_in_the_grammar():
    async def scenario() -> list[str]:
        async with byte_server() as (client, _):
            asked = {"prompt": "x", "n": 4, "seed": 1, "guided_regex": "[a-z]{8}"}
            answer = await client.post(COMPLETIONS, json={**asked, "max_tokens": 8})
            return [choice["text"] for choice in answer.json()["choices"]]

    texts = asyncio.run(scenario())
    assert all(len(text) == 8 and text.islower() for text in texts)
    assert len(set(texts)) == 4


def test_a_streamed_text_is_the_whole_one_and_says_how_it_ended():
    asked = {"prompt": "x", "seed": 3, "max_tokens": 40, "guided_regex": "[a-f]{3}-[0-9]{4}"}

    async def scenario(max_tokens: int) -> tuple[str, str, str, str]:
        async with byte_server() as (client, _):
            fields = {**asked, "max_tokens": max_tokens}
            whole = (await client.post(COMPLETIONS, json=fields)).json()["choices"][0]
            stream = events(await client.post(COMPLETIONS, json={**fields, "stream": True}))
            text = "".join(chunk["choices"][0]["text"] for chunk in stream)
            last = stream[-1]["choices"][0]
            return whole["text"], text, whole["finish_reason"], last["finish_reason"]

    whole, streamed, *reasons = asyncio.run(scenario(40))
    assert whole == streamed
    assert len(whole) == 8
    assert reasons == ["stop", "stop"]
    whole, streamed, *reasons = asyncio.run(scenario(5))
    assert (whole, reasons) == (streamed, ["length", "length"])


def test_a_grammar_that_fails_midway_ends_its_stream_with_an_error_event(monkeypatch):
    async def scenario() -> str:
        async with byte_server() as (client, bench):
            calls = iter(range(100))
            mask_of = bench.followers._compiler.mask_of

            def failing(matcher: Any) -> bytes:
                if next(calls) > 2:
                    raise InvalidParameter("a limit was reached", param="guided_regex")
                return mask_of(matcher)

            monkeypatch.setattr(bench.followers._compiler, "mask_of", failing)
            asked = {"prompt": "x", "stream": True, "guided_regex": "[a-z]{9}"}
            answer = await client.post(COMPLETIONS, json=asked)
            return answer.text

    text = asyncio.run(scenario())
    *_, error, done = [line for line in text.split("\n\n") if line]
    assert done == "data: [DONE]"
    found = json.loads(error.removeprefix("data: "))["error"]
    assert (found["param"], found["type"]) == ("guided_regex", "invalid_request_error")
