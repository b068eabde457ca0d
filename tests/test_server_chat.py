"""Chat completions over a scripted engine: shapes, order, usage, log-probabilities."""

from __future__ import annotations

import asyncio

import pytest

from nsa_serve.request import FinishReason
from tests.server_fakes import MODEL, events, fake_server


def test_an_answer_has_openais_shape():
    async def scenario():
        async with fake_server() as server:
            return (await server.chat()).json()

    body = asyncio.run(scenario())
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi é!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 22,
        "completion_tokens": 6,
        "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_the_first_chunk_carries_the_role_and_the_last_the_reason():
    async def scenario():
        async with fake_server() as server:
            server.engine.stop_reason = "!"
            return events(await server.chat(stream=True))

    chunks = asyncio.run(scenario())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "Hi é!"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["stop_reason"] == "!"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_no_chunk_is_sent_for_a_token_that_is_half_a_character():
    async def scenario():
        async with fake_server() as server:
            return events(await server.chat(stream=True))

    contents = [chunk["choices"][0]["delta"].get("content") for chunk in asyncio.run(scenario())]
    assert contents == ["", "H", "i", " ", "é", "!"]


def test_usage_comes_last_without_choices_when_asked_for():
    async def scenario():
        async with fake_server() as server:
            return events(await server.chat(stream=True, stream_options={"include_usage": True}))

    *chunks, last = asyncio.run(scenario())
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_continuous_usage_grows_with_each_chunk():
    async def scenario():
        options = {"include_usage": True, "continuous_usage_stats": True}
        async with fake_server() as server:
            return events(await server.chat(stream=True, stream_options=options))

    usages = [chunk["usage"] for chunk in asyncio.run(scenario())]
    assert all("prompt_tokens_details" not in usage for usage in usages[:-1])
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_n_choices_have_seeds_that_follow_each_other():
    async def scenario():
        async with fake_server() as server:
            body = (await server.chat(n=3, seed=41)).json()
            return body, [request.sampling.seed for request in server.engine.requests]

    body, seeds = asyncio.run(scenario())
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert seeds == [41, 42, 43]
    assert body["usage"]["prompt_tokens"] == 22
    assert body["usage"]["completion_tokens"] == 18


def test_each_of_n_streamed_choices_is_whole():
    async def scenario():
        async with fake_server() as server:
            return events(await server.chat(n=2, stream=True))

    texts = {0: "", 1: ""}
    for chunk in asyncio.run(scenario()):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Hi é!", 1: "Hi é!"}


def test_logprobs_carry_bytes_and_alternatives():
    async def scenario():
        async with fake_server() as server:
            return (await server.chat(logprobs=True, top_logprobs=2, max_tokens=4)).json()

    content = asyncio.run(scenario())["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    assert content[3]["bytes"] == [0xC3]
    assert content[3]["token"] == "\ufffd"


def test_logprobs_without_a_number_give_no_alternatives():
    async def scenario():
        async with fake_server() as server:
            return events(await server.chat(logprobs=True, stream=True))

    chunks = asyncio.run(scenario())
    entries = [e for c in chunks if c["choices"][0]["logprobs"]
               for e in c["choices"][0]["logprobs"]["content"]]  # fmt: skip
    assert len(entries) == 6
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_prompt_logprobs_come_in_vllms_form():
    async def scenario():
        async with fake_server() as server:
            return (await server.chat(prompt_logprobs=1)).json()["prompt_logprobs"]

    first, second, *_ = asyncio.run(scenario())
    assert first is None
    assert second == {"117": {"logprob": -0.5, "rank": 1, "decoded_token": "u"}}


def test_max_completion_tokens_goes_before_max_tokens():
    async def scenario():
        async with fake_server() as server:
            await server.chat(max_completion_tokens=5, max_tokens=7)
            await server.chat()
            return [request.sampling.max_tokens for request in server.engine.requests]

    assert asyncio.run(scenario()) == [5, 1000 - 22]


def test_every_sampling_field_reaches_the_engine():
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.1, "ignore_eos": True,
        "min_tokens": 2, "skip_special_tokens": False,
    }  # fmt: skip

    async def scenario():
        async with fake_server() as server:
            await server.chat(
                **fields, stop="END", stop_token_ids=[7], logit_bias={"5": -100, "6": 1.5},
                include_stop_str_in_output=True, priority=3, cache_salt="tenant",
            )  # fmt: skip
            return server.engine.requests[0]

    request = asyncio.run(scenario())
    for name, value in fields.items():
        assert getattr(request.sampling, name) == value, name
    assert request.sampling.stop == ("END",)
    assert request.sampling.stop_token_ids == (7,)
    assert request.sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert request.sampling.include_stop
    assert (request.priority, request.cache_salt) == (3, "tenant")


def test_text_parts_are_joined_and_developer_means_system():
    async def scenario():
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "assistant", "content": None},
        ]
        async with fake_server() as server:
            await server.chat(messages=messages, add_generation_prompt=False)
            return bytes(server.engine.requests[0].prompt_token_ids).decode()

    assert asyncio.run(scenario()) == "<system>Be brief.<user>a\nb<assistant>"


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_the_finish_reason_is_the_engines(reason):
    async def scenario():
        async with fake_server() as server:
            server.engine.reason = reason
            return (await server.chat()).json()["choices"][0]["finish_reason"]

    assert asyncio.run(scenario()) == reason.value


def test_harmless_and_unknown_fields_are_ignored():
    async def scenario():
        async with fake_server() as server:
            return await server.chat(
                user="u", store=True, metadata={"a": "b"}, service_tier="auto", frobnicate=[1],
                tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias=None,
                parallel_tool_calls=True, modalities=["text"],
            )  # fmt: skip

    assert asyncio.run(scenario()).status_code == 200
