"""The embedded model behind a real server, asked by the official client."""

from __future__ import annotations

import asyncio
import base64
import json
import re

import httpx
import numpy as np
import openai
import pydantic
import pytest

from tests.server_process import running

MODEL = "smollm2-135m-instruct"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="session")
def url():
    flags = (MODEL, "--attention", "nsa", "--dtype", "float32", "--kv-cache-memory-bytes", "512M")
    with running(*flags, "--max-model-len", "2048", "--max-num-seqs", "32") as server:
        yield server.url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_is_the_same_streamed_and_whole(client):
    asked = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == "The capital of France is Paris."
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_models_lists_the_embedded_one(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 2048)


def test_a_trace_shows_the_blocks_of_a_long_prompt(url, client):
    asked = {"model": MODEL, "prompt": LONG * 8, "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**asked)
    traced = client.completions.create(**asked, extra_body={"nsa_trace": True})
    assert traced.choices[0].text == plain.choices[0].text
    trace = httpx.get(f"{url}/traces/{traced.id}").json()
    assert (trace["layers"], trace["kv_heads"], trace["selected"]) == (30, 3, 16)
    assert trace["gates"] is None
    assert "".join(token["text"] for token in trace["tokens"]) == plain.choices[0].text
    assert trace["blocks"][0].startswith("The quick brown fox")
    chosen = np.frombuffer(base64.b64decode(trace["selection"]), "<i4").reshape(4, 30, 3, 16)
    pages = -(-trace["num_prompt_tokens"] // 64)
    assert pages > 16
    assert (chosen[..., 0] == 0).all()
    assert (np.diff(chosen) > 0).all()
    assert (chosen[0, ..., -2:] == [pages - 2, pages - 1]).all()


def test_sixteen_requests_at_once_are_all_answered(url):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask(number):
                stream = await client.completions.create(
                    model=MODEL, prompt=f"Letter {number}:", max_tokens=6, stream=True,
                    extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
                )  # fmt: skip
                return [chunk async for chunk in stream][-1].usage

            return await asyncio.gather(*(ask(number) for number in range(16)))

    usages = asyncio.run(scenario())
    assert [usage.completion_tokens for usage in usages] == [6] * 16


def test_a_seed_gives_the_same_choices_again(client):
    def ask():
        answer = client.chat.completions.create(
            model=MODEL, messages=PARIS, seed=5, n=2, max_tokens=6, temperature=1.5
        )
        return [choice.message.content for choice in answer.choices]

    assert ask() == ask()


def test_what_was_cached_is_counted_exactly(client):
    def cached():
        answer = client.completions.create(model=MODEL, prompt=LONG, max_tokens=1)
        return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens

    cached()
    num_prompt, num_cached = cached()
    assert num_cached == (num_prompt - 1) // 64 * 64


def test_a_cache_salt_separates_tenants(client):
    def cached(salt):
        answer = client.completions.create(
            model=MODEL, prompt=LONG, max_tokens=1, extra_body={"cache_salt": salt}
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    cached("mine")
    assert cached("mine") > 0
    assert cached("yours") == 0


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, stop=["is Par"], max_tokens=16
    )
    choice = answer.choices[0]
    assert choice.message.content == "The capital of France "
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "is Par")


def test_an_echo_has_logprobs_of_the_whole_prompt(client):
    prompt = "The capital of France is"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert choice.text == "".join(logprobs.tokens) == f"{prompt} Paris"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert [len(token) for token in logprobs.tokens[:-1]] == [
        after - before
        for before, after in zip(logprobs.text_offset, logprobs.text_offset[1:], strict=False)
    ]


def test_chat_logprobs_have_their_bytes(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob


def test_words_that_must_not_be_said_are_not(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=8,
        extra_body={"bad_words": ["Paris", "capital of France"]},
    )  # fmt: skip
    said = answer.choices[0].message.content
    assert said.startswith("The capital of")
    assert "Paris" not in said
    assert "capital of France" not in said


def test_an_answer_is_as_long_as_asked_at_least(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=12, extra_body={"min_tokens": 10}
    )
    assert answer.choices[0].message.content.startswith("The capital of France is Paris.")
    assert answer.usage.completion_tokens >= 10


def test_a_bias_makes_a_token_certain(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital", max_tokens=3, logit_bias={"100": 100}
    )
    assert len(set(answer.choices[0].text)) == 1


def test_prompt_logprobs_are_of_each_prompt_token(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1,
        extra_body={"prompt_logprobs": 1},
    )  # fmt: skip
    first, *others = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(others) == answer.usage.prompt_tokens - 1
    assert "".join(list(entry.values())[-1]["decoded_token"] for entry in others) == (
        " capital of France is"
    )


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_a_tool_that_must_be_called_is(client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Weather in Paris?"}], temperature=0,
        tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=60,
    )  # fmt: skip
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("weather", "tool_calls")
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_response_is_the_same_streamed_and_whole(client):
    asked = {"model": MODEL, "input": PARIS, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text == "The capital of France is Paris."
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_a_client_that_leaves_frees_its_place(url):
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        # Answers to pings come between steps, so that the abort is seen within a few.
        for _ in range(1000):
            http.get("/health")
            page = http.get("/metrics").text
            if f'num_requests_running{{model_name="{MODEL}"}} 0.0' in page:
                return
    raise AssertionError("the request still runs")


BAD = [
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": 4000}, openai.BadRequestError, "messages"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"n": 1000}, openai.BadRequestError, "n"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"stop": [""]}, openai.BadRequestError, "stop[0]"),
    ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
    ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools[0].function"),
    ({"model": "gpt-5"}, openai.NotFoundError, "model"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        openai.BadRequestError,
        "messages[0].content",
    ),
    (
        {"messages": [{"role": "user", "content": LONG * 100}]},
        openai.BadRequestError,
        "messages",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "param"), BAD)
def test_bad_input_is_told_and_the_engine_still_answers(client, fields, kind, param):
    good = {"model": MODEL, "messages": PARIS, "max_tokens": 1}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**good, **fields})
    assert caught.value.param == param
    assert client.chat.completions.create(**good).usage.completion_tokens == 1


RAW = [
    (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
    (b'{"prompt": "\xff"}', "application/json", 400),
    (b"{", "application/json", 400),
    (b'{"prompt": "a"}', "text/plain", 400),
    (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', "application/json", 413),
]


@pytest.mark.parametrize(("content", "kind", "status"), RAW)
def test_a_bad_body_is_told_and_the_engine_still_answers(url, content, kind, status):
    with httpx.Client(base_url=url, timeout=60) as http:
        headers = {"content-type": kind}
        refused = http.post("/v1/completions", content=content, headers=headers)
        assert refused.status_code == status
        assert set(json.loads(refused.text)["error"]) == {"message", "type", "param", "code"}
        good = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert good.status_code == 200


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_the_official_client_parses_a_model_of_pydantic(client):
    asked = [{"role": "user", "content": "Anna is seven years old. Describe Anna as JSON."}]
    answer = client.chat.completions.parse(
        model=MODEL, messages=asked, response_format=Person, temperature=0, max_tokens=60
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)
    response = client.responses.parse(
        model=MODEL, input=asked, text_format=Person, temperature=0, max_output_tokens=60
    )
    assert response.output_parsed == choice.message.parsed


def test_a_streamed_answer_of_the_official_client_follows_its_pattern(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=PARIS, stream=True, temperature=1.5, max_tokens=40,
        extra_body={"structured_outputs": {"regex": "[A-Z][a-z]{3,9}, [0-9]{4}"}},
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert re.fullmatch("[A-Z][a-z]{3,9}, [0-9]{4}", text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_the_engine_process_refuses_is_a_400(client, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=PARIS, stream=stream, extra_body={"guided_regex": "(["}
        )
    assert (caught.value.param, caught.value.status_code) == ("guided_regex", 400)
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, extra_body={"guided_choice": ["Paris", "Rome"]}
    )
    assert answer.choices[0].message.content in ("Paris", "Rome")
