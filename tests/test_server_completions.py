"""Text completions over a scripted engine: prompts of every form, order, echo, log-probs."""

from __future__ import annotations

import asyncio

import pytest

from tests.server_fakes import BOS, events, fake_server


def complete(prompt="Hello", **fields):
    async def scenario():
        async with fake_server() as server:
            response = await server.complete(prompt, **fields)
            return response, server.engine.requests

    return asyncio.run(scenario())


def test_an_answer_has_openais_shape():
    response, requests = complete()
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hi é!", "logprobs": None, "finish_reason": "stop",
         "stop_reason": None}
    ]  # fmt: skip
    assert requests[0].sampling.max_tokens == 16
    assert requests[0].prompt_token_ids == [BOS, *b"Hello"]


@pytest.mark.parametrize(
    ("prompt", "encoded"),
    [
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_prompts_come_as_lists_of_texts_or_of_token_ids(prompt, encoded):
    _, requests = complete(prompt)
    assert [request.prompt_token_ids for request in requests] == encoded


def test_special_tokens_are_left_out_when_asked():
    _, requests = complete("a", add_special_tokens=False)
    assert requests[0].prompt_token_ids == [97]


def test_choices_of_one_prompt_stand_together():
    response, requests = complete(["a", "b"], n=2, seed=7)
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2, 3]
    assert [request.prompt_token_ids[1] for request in requests] == [97, 97, 98, 98]
    assert [request.sampling.seed for request in requests] == [7, 8, 7, 8]
    assert response.json()["usage"]["prompt_tokens"] == 4


def test_a_stream_ends_with_reason_and_usage():
    response, _ = complete(stream=True, stream_options={"include_usage": True})
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hi é!"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)


@pytest.mark.parametrize("prompt", ["Hello", list(b"Hello")])
def test_echo_puts_the_prompt_before_the_text(prompt):
    response, _ = complete(prompt, echo=True)
    assert response.json()["choices"][0]["text"] == "HelloHi é!"


def test_a_streamed_echo_comes_once():
    response, _ = complete(["x", "y"], echo=True, stream=True)
    texts = {0: "", 1: ""}
    for chunk in events(response):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "xHi é!", 1: "yHi é!"}


def test_logprobs_have_the_older_shape():
    response, _ = complete(logprobs=2, max_tokens=5)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "i", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["top_logprobs"][0] == {"H": -0.5, "I": -1.5}


def test_zero_logprobs_give_the_sampled_token_alone():
    response, _ = complete(logprobs=0, max_tokens=1)
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"H": -0.5}]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_covers_the_prompt(stream):
    response, requests = complete(list(b"abc"), echo=True, logprobs=1, max_tokens=2, stream=stream)
    parts = events(response) if stream else [response.json()]
    found = [part["choices"][0]["logprobs"] for part in parts]
    assert requests[0].sampling.prompt_logprobs == 1
    assert [t for part in found for t in part["tokens"]] == ["a", "b", "c", "H", "i"]
    assert [o for part in found for o in part["text_offset"]] == [0, 1, 2, 3, 4]
    values = [v for part in found for v in part["token_logprobs"]]
    assert values == [None, -0.5, -0.5, -0.5, -0.5]


def test_offsets_go_on_from_chunk_to_chunk():
    response, _ = complete(logprobs=1, stream=True)
    offsets = [
        o for chunk in events(response) for o in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 1, 2, 3, 3, 4]


def test_prompt_logprobs_stand_in_their_choice():
    response, _ = complete([97, 98], prompt_logprobs=0)
    shown = response.json()["choices"][0]["prompt_logprobs"]
    assert shown == [None, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]


def test_best_of_may_equal_n():
    assert complete(n=2, best_of=2)[0].status_code == 200
