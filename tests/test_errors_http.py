"""Every row of the table of errors, and every kind of bad input, over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_serve.errors import EngineDead, Overloaded
from tests.server_fakes import events, fake_server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def ask(path, body=None, *, content=None, headers=None, change=None, **server_settings):
    """One request; then another, which must be answered as if nothing had happened."""

    async def scenario():
        async with fake_server(**server_settings) as server:
            if change is not None:
                change(server)
            response = await server.client.post(path, json=body, content=content, headers=headers)
            if change is None and "api_keys" not in server_settings:
                assert (await server.chat()).status_code == 200
            assert server.services.admission.num_open == 0
            return response

    return asyncio.run(scenario())


def check(response, status, *, param=None, code=None, text=""):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"] == code
    assert text in error["message"]
    assert len(error["message"]) <= 5000


WRONG = {
    "temperature": ["0.5", -1, True, [], 1e9],
    "top_p": [0, 1.5, "x"],
    "min_p": [-0.1, 1.1],
    "top_k": [-2, 1.5],
    "presence_penalty": [2.5, -3],
    "frequency_penalty": [2.5, "1"],
    "repetition_penalty": [0, -1],
    "n": [0, -1, 1000, 1.5, "2"],
    "max_tokens": [0, -1, "5", 1.5],
    "min_tokens": [-1],
    "seed": ["1", 1 << 70],
    "stop": [[""], ["x"] * 17, 3, "x" * 300],
    "stop_token_ids": ["x", [1.5], [-1], [1] * 200],
    "stream": ["yes", 1],
    "logit_bias": ["x", [1]],
    "prompt_logprobs": [21, -1],
    "bad_words": ["x", [""], ["x"] * 200, [1], ["x" * 300]],
    "priority": ["high"],
    "cache_salt": [1],
    "model": [1],
    "stream_options": ["x"],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_wrong_value_is_a_400_that_names_the_field(path, name, value):
    body = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    response = ask(path, {**body, name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition("[")[0] == name
    assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(value):
    content = f'{{"prompt": "hi", "temperature": {value}}}'
    response = ask(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    check(response, 400, param="temperature", text="finite")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("guided_whitespace_pattern", " ?"),
        ("chat_template", "{{ 1 }}"),
        ("best_of", 3),
        ("allowed_token_ids", [1]),
        ("suffix", "x"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name, value):
    check(
        ask(CHAT, {"messages": HI, name: value}), 400, param=name, text=f"{name} is not supported"
    )


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"", "application/json", "not valid JSON"),
        (b"[" * 100_000, "application/json", "not valid JSON"),
        (b'{"prompt": "\xff"}', "application/json", "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "application/json", "not valid JSON"),
        (b"[]", "application/json", "object"),
        (b'"x"', "application/json; charset=utf-8", "object"),
        (b'{"prompt": "hi"}', "text/plain", "content-type"),
        (b'{"prompt": "hi"}', "application/x-www-form-urlencoded", "content-type"),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(content, kind, text):
    response = ask(COMPLETIONS, content=content, headers={"content-type": kind})
    check(response, 400, text=text)


@pytest.mark.parametrize(
    "prompt", [None, 3, [], [[]], [1, "a"], ["a", 1], [True], [-1], [2**40], [[1], "a"], {}]
)
def test_a_prompt_of_no_known_form_is_refused(prompt):
    check(ask(COMPLETIONS, {"prompt": prompt}), 400, param="prompt", text="prompt: must be")


@pytest.mark.parametrize(
    ("messages", "param", "text"),
    [
        ([], "messages", ""),
        ("hi", "messages", ""),
        ([{"role": "user"}], "messages[0]", "content is required"),
        ([{"content": "x"}], "messages[0].role", "required"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "robot"),
        ([*HI, {"role": "user", "content": 1}], "messages[1].content", ""),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content",
            "text only",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content", "part 0"),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].function",
            "required",
        ),
        (
            [{"role": "user", "content": "", "tool_calls": []}, {"role": "tool"}],
            "messages[1]",
            "content is required",
        ),
    ],
)
def test_messages_that_can_not_be_used_are_named(messages, param, text):
    check(ask(CHAT, {"messages": messages}), 400, param=param, text=text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (COMPLETIONS, {}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, None),
        (CHAT, {"messages": HI, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"258": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        (
            COMPLETIONS,
            {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}},
            "logit_bias",
        ),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [258]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": [258]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "min_tokens": 17}, "min_tokens"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1000, "n": 2}, "n"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ],
)
def test_a_missing_or_impossible_field_is_a_400(path, body, param):
    response = ask(path, body)
    if param is None:
        assert response.status_code in (200, 400)
    else:
        check(response, 400, param=param)


@pytest.mark.parametrize("limit", [{"max_queued_requests": 3}, {"max_queued_tokens": 7}])
def test_more_choices_than_the_queue_holds_are_a_400(limit):
    check(
        ask(COMPLETIONS, {"prompt": "a", "n": 4}, **limit), 400, param="n", text="the queue holds"
    )
    check(ask(CHAT, {"messages": HI, "n": 4}, **limit), 400, param="n", text="the queue holds")


def test_a_wrong_entry_of_a_map_is_named():
    response = ask(COMPLETIONS, {"prompt": "a", "logit_bias": {"7": 101}})
    check(response, 400, param="logit_bias.7")


@pytest.mark.parametrize("max_tokens", [1, 900, None])
def test_a_prompt_over_the_context_is_told_in_openais_words(max_tokens):
    length = 1000 if max_tokens is None else 1001 - max_tokens
    response = ask(COMPLETIONS, {"prompt": [65] * length, "max_tokens": max_tokens})
    check(
        response,
        400,
        param="prompt",
        code="context_length_exceeded",
        text="This model's maximum context length is 1000 tokens. However, you requested",
    )


def test_a_conversation_over_the_context_is_told_so_too():
    body = {"messages": [{"role": "user", "content": "x" * 2000}]}
    check(ask(CHAT, body), 400, param="messages", code="context_length_exceeded")


def test_a_template_that_refuses_is_a_400():
    body = {"messages": HI, "chat_template_kwargs": {"refuse": True}}
    check(ask(CHAT, body), 400, param="messages", text="refuses")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "model": "other"}),
        (COMPLETIONS, {"prompt": "a", "model": "other"}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {"tokens": [1], "model": "other"}),
    ],
)
def test_an_unknown_model_is_a_404(path, body):
    check(ask(path, body), 404, param="model", code="model_not_found", text="other")


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "Basic right", "right"])
def test_a_wrong_key_is_a_401(key):
    headers = {} if key is None else {"authorization": key}
    response = ask(CHAT, {"messages": HI}, headers=headers, api_keys=("right", "other"))
    check(response, 401, code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["right", "other"])
def test_each_of_the_keys_is_taken(key):
    headers = {"authorization": f"Bearer {key}"}
    response = ask(CHAT, {"messages": HI}, headers=headers, api_keys=("right", "other"))
    assert response.status_code == 200


async def _chunks(size, count):
    for _ in range(count):
        yield b"x" * size


def test_a_body_of_5_megabytes_is_a_413():
    headers = {"content-type": "application/json"}
    check(ask(CHAT, content=b"x" * 5_000_000, headers=headers), 413, text="4194304 bytes")


def test_a_body_that_hides_its_length_is_counted():
    headers = {"content-type": "application/json"}
    response = ask(CHAT, content=_chunks(1 << 20, 5), headers=headers)
    assert "content-length" not in response.request.headers
    check(response, 413)


def test_a_refused_body_is_not_read_for_ever():
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1 << 20
            yield b"x" * (1 << 20)

    headers = {"content-type": "application/json"}
    check(ask(CHAT, content=endless(), headers=headers), 413)
    assert read < 64 << 20


def test_a_long_context_admits_longer_bodies():
    body = {"prompt": "x" * 5_000_000}
    response = ask(COMPLETIONS, body, max_model_len=1 << 20)
    check(response, 400, param="prompt", code="context_length_exceeded")


def test_a_draining_server_answers_503_with_retry_after():
    def drain(server):
        server.services.admission.draining = True

    response = ask(CHAT, {"messages": HI}, change=drain)
    check(response, 503, code="overloaded", text="shutting down")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [{"max_open_requests": 2}, {"max_open_tokens": 30}])
def test_a_full_queue_answers_503_with_retry_after(stream, limit):
    async def scenario():
        async with fake_server(**limit) as server:
            server.engine.gate.clear()
            first = asyncio.create_task(server.chat(n=2))
            while not server.services.admission.num_open:
                await asyncio.sleep(0)
            refused = await server.chat(stream=stream)
            server.engine.gate.set()
            return await first, refused, server.services.admission.num_rejected

    first, refused, num_rejected = asyncio.run(scenario())
    assert first.status_code == 200
    check(refused, 503, code="overloaded", text="queue is full")
    assert int(refused.headers["retry-after"]) > 0
    assert num_rejected == 1


def _fails(error, after=0):
    def change(server):
        server.engine.error = error
        server.engine.error_after = after

    return change


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("logits were NaN at /srv/engine.py", "step_failed"),
        (EngineDead("killed at /srv/engine.py"), "engine_dead"),
        (ValueError("/srv/engine.py line 3"), "internal_error"),
    ],
)
def test_a_failure_before_the_first_token_is_a_500_that_shows_nothing(error, code, stream):
    body = {"messages": HI, "stream": stream}
    response = ask(CHAT, body, change=_fails(error))
    check(response, 500, code=code)
    assert "/srv" not in response.text


def test_an_engine_that_is_full_after_all_keeps_its_status():
    body = {"messages": HI, "stream": True}
    response = ask(CHAT, body, change=_fails(Overloaded("the queue is full", retry_after=7)))
    check(response, 503, code="overloaded")
    assert response.headers["retry-after"] == "7"


def test_a_failure_mid_stream_is_an_event_and_then_the_end():
    response = ask(CHAT, {"messages": HI, "stream": True}, change=_fails("NaN at /srv", after=2))
    *chunks, last = events(response)
    assert len(chunks) >= 1
    assert last["error"]["code"] == "step_failed"
    assert "/srv" not in response.text


def test_a_fault_nobody_foresaw_is_a_nested_500():
    def break_encoder(server):
        server.services.tokenizer.encode = None

    response = ask(CHAT, {"messages": HI}, change=break_encoder)
    check(response, 500, code="internal_error", text="internal server error")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nowhere", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405),
    ("GET", "/v1/models/other", 404),
])  # fmt: skip
def test_unknown_paths_and_methods_are_nested_errors(method, path, status):
    async def scenario():
        async with fake_server() as server:
            return await server.client.request(method, path)

    response = asyncio.run(scenario())
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_the_client_sent_is_shown_to_200_characters():
    response = ask(CHAT, {"messages": HI, "temperature": "x" * 100_000})
    assert 150 < response.text.count("x") <= 200


def test_of_many_errors_ten_are_told():
    messages = [{"role": "user", "content": "x"}] * 3
    body = {"messages": messages, **{name: {} for name in WRONG}}
    message = ask(CHAT, body).json()["error"]["message"]
    assert message.count(";") == 10
    assert "more" in message


def test_a_long_list_of_wrong_items_is_told_in_one_line():
    response = ask(CHAT, {"messages": HI, "stop_token_ids": ["x"] * 100})
    check(response, 400, param="stop_token_ids[0]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = [
    *("model", "messages", "prompt", "n", "stream", "stream_options", "temperature", "top_p"),
    *("top_k", "min_p", "seed", "stop", "stop_token_ids", "max_tokens", "max_completion_tokens"),
    *("min_tokens", "logprobs", "top_logprobs", "echo", "prompt_logprobs", "logit_bias"),
    *("priority", "tools", "response_format", "best_of", "user", "chat_template_kwargs"),
    *("add_special_tokens", "tokens", "return_token_strs", "bad_words", "tool_choice"),
    *("parallel_tool_calls", "input", "instructions", "text", "store", "include", "reasoning"),
    *("metadata", "max_output_tokens", "truncation", "previous_response_id"),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
TALKS = [
    HI,
    [{"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "content": "x"}],
    [{"role": "assistant", "content": "x", "reasoning": "y"}, *HI],
]
INPUTS = [
    "hi",
    [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
    [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}],
    [{"type": "function_call_output", "call_id": "c", "output": "x"}, {"type": "reasoning"}],
]
FIELDS = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.sampled_from(TALKS),
        "input": st.sampled_from(INPUTS),
        "tools": st.sampled_from([[TOOL], [{"type": "function", "name": "f"}], []]),
        "tool_choice": st.sampled_from(
            [
                "none",
                "auto",
                "required",
                {"type": "function", "name": "f"},
                {"type": "function", "function": {"name": "f"}},
            ]
        ),
        "prompt": st.sampled_from(["a", ["a", "b"], [1, 2], [[1], [2]]]),
        "tokens": st.just([1, 2]),
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "logprobs": st.sampled_from([True, 1]),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([CHAT, COMPLETIONS, "/v1/responses", "/tokenize", "/detokenize"]),
    VALID,
    FIELDS,
    st.none() | st.binary(max_size=40),
)
def test_no_body_makes_a_500(path, valid, fields, raw):
    content = json.dumps({**valid, **fields}).encode() if raw is None else raw

    async def scenario():
        async with fake_server() as server:
            headers = {"content-type": "application/json"}
            return await server.client.post(path, content=content, headers=headers)

    response = asyncio.run(scenario())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
