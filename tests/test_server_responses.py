"""The Responses API over a scripted engine, through the official client wherever it can be."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from nsa_serve.request import FinishReason
from nsa_serve.server.settings import ReasoningParser
from tests.server_fakes import ByteTokenizer, fake_server

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THOUGHT = f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}"
HERMES = "{% if tools %}<tool_call>{% endif %}"


def serve(ask, *, reply="Hi é!", template=HERMES, change=None, **server_settings):
    """(what ``ask`` gives, the engine's requests, the conversation that the template saw)."""

    async def scenario():
        tokenizer = ByteTokenizer(template)
        async with fake_server(tokenizer, max_model_len=4000, **server_settings) as server:
            server.engine.reply = reply
            if change is not None:
                change(server)
            return await ask(server), server.engine.requests, tokenizer.turns

    return asyncio.run(scenario())


def create(reply="Hi é!", **fields):
    """The response that the official client gets."""
    settings = fields.pop("server", {})
    fields = {"model": "fake", "input": "Hello", **fields}
    return serve(lambda s: s.openai.responses.create(**fields), reply=reply, **settings)


def test_a_text_is_answered():
    response, requests, turns = create(temperature=0.5, top_p=0.9, metadata={"a": "b"})
    assert turns == [{"role": "user", "content": "Hello"}]
    assert (response.status, response.output_text, response.object) == (
        "completed",
        "Hi é!",
        "response",
    )
    assert response.id.startswith("resp_")
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (22, 6)
    assert response.usage.total_tokens == 28
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert (response.temperature, response.top_p, response.metadata) == (0.5, 0.9, {"a": "b"})
    assert (response.error, response.incomplete_details) == (None, None)
    assert requests[0].sampling.temperature == 0.5
    assert not requests[0].stream


def test_the_other_sampling_fields_go_too():
    _, requests, _ = create(
        max_output_tokens=7, extra_body={"seed": 3, "min_p": 0.1, "stop": "x", "cache_salt": "a"}
    )
    sampling = requests[0].sampling
    assert (sampling.max_tokens, sampling.seed, sampling.stop) == (7, 3, ("x",))
    assert (sampling.min_p, requests[0].cache_salt) == (0.1, "a")


def test_an_answer_that_is_too_long_is_incomplete():
    def cut(server):
        server.engine.reason = FinishReason.LENGTH

    response, *_ = serve(
        lambda s: s.openai.responses.create(model="fake", input="x", max_output_tokens=2),
        change=cut,
    )
    assert (response.status, response.output_text) == ("incomplete", "Hi")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


ITEMS = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [],
     "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"role": "assistant", "id": "msg_1", "status": "completed", "type": "message",
     "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Köln"}'},
    {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    {"type": "function_call_output", "call_id": "c2",
     "output": [{"type": "input_text", "text": "sun"}]},
    {"role": "assistant", "content": "Rain and sun."},
    {"role": "user", "content": "Thanks"},
]  # fmt: skip


def test_items_become_the_messages_that_templates_know():
    _, _, turns = create(input=ITEMS, instructions="You are kind.", tools=[WEATHER])
    roles = [turn["role"] for turn in turns]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert turns[0]["content"] == "You are kind.\n\nBe brief."
    said = turns[2]
    assert (said["content"], said["reasoning_content"]) == ("I look.", "Hm.")
    called = [call["function"]["arguments"] for call in said["tool_calls"]]
    assert called == [{"city": "Köln"}, {}]
    assert [turn["tool_call_id"] for turn in turns[3:5]] == ["c1", "c2"]
    assert [turn["content"] for turn in turns[3:]] == ["rain", "sun", "Rain and sun.", "Thanks"]


def test_what_came_out_can_go_in_again():
    async def ask(server):
        first = await server.openai.responses.create(model="fake", input="Hi", tools=[WEATHER])
        again = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output]]
        again.append(
            {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rain"}
        )
        return await server.openai.responses.create(model="fake", input=again, tools=[WEATHER])

    _, _, turns = serve(ask, reply=THOUGHT, reasoning_parser=ReasoningParser.QWEN3)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
    assert turns[1]["reasoning_content"] == "Hm."
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}


def test_thoughts_text_and_calls_are_items():
    server = {"reasoning_parser": ReasoningParser.QWEN3}
    response, *_ = create(THOUGHT, tools=[WEATHER], server=server)
    thought, message, call = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, message.content[0].text) == ("message", "Let me look.")
    assert (call.type, call.name, call.arguments) == (
        "function_call",
        "weather",
        '{"city": "Köln"}',
    )
    assert call.call_id.startswith("call_")
    assert response.usage.output_tokens_details.reasoning_tokens == len("Hm.")


def stream(reply, **fields):
    """(the events, the last response) as the official client's helper gathers them."""
    settings = fields.pop("server", {})

    async def ask(server):
        manager = server.openai.responses.stream(model="fake", input="Hello", **fields)
        async with manager as opened:
            seen = [event async for event in opened]
            return seen, await opened.get_final_response()

    return serve(ask, reply=reply, **settings)[0]


def test_a_stream_tells_of_each_step():
    seen, response = stream("Hi")
    assert [event.type for event in seen] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert (response.output_text, response.usage.output_tokens) == ("Hi", 2)
    assert seen[0].response.status == "in_progress"
    assert seen[-1].response.id == seen[0].response.id


def plain(response):
    """The output without its ids, which are new each time."""
    items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
    for item in items:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    return items


@pytest.mark.parametrize("reply", ["Hi é!", THOUGHT, f"{CALL}\nDone.\n{CALL}", "<think>Hm.", " "])
def test_a_stream_joined_is_the_whole_response(reply):
    fields = {"tools": [WEATHER], "server": {"reasoning_parser": ReasoningParser.QWEN3}}
    seen, streamed = stream(reply, **fields)
    whole, *_ = create(reply, **fields)
    assert plain(streamed) == plain(whole)
    deltas = [event for event in seen if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == "".join(
        item.arguments for item in whole.output if item.type == "function_call"
    )
    added = [event for event in seen if event.type == "response.output_item.added"]
    done = [event for event in seen if event.type == "response.output_item.done"]
    assert [e.output_index for e in added] == [e.output_index for e in done]
    assert (
        [e.item.id for e in added] == [e.item.id for e in done] == [i.id for i in streamed.output]
    )


def test_a_stream_without_the_helper_has_named_events_and_no_done():
    response, *_ = serve(lambda s: s.post(PATH, {"input": "Hi", "stream": True}))
    blocks = response.text.strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert blocks[-1].startswith("event: response.completed\n")


def test_a_failure_after_the_beginning_is_an_event():
    def fail(server):
        server.engine.error_after = 2

    response, *_ = serve(lambda s: s.post(PATH, {"input": "Hi", "stream": True}), change=fail)
    *_, error, failed = [
        json.loads(block.partition("data: ")[2]) for block in response.text.strip().split("\n\n")
    ]
    assert (error["type"], error["code"]) == ("error", "step_failed")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["sequence_number"] == error["sequence_number"] + 1
    assert "/srv" not in response.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_forced_calls_are_a_grammar(choice):
    forced = '[{"name": "weather", "arguments": {"city": "Bonn"}}]'
    response, requests, _ = create(forced, tools=[WEATHER], tool_choice=choice)
    assert requests[0].sampling.grammar is not None
    assert [item.type for item in response.output] == ["function_call"]
    assert response.tools[0].name == "weather"


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"store": True}, "store", "whole conversation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"background": True}, "background", "whole conversation"),
        ({"truncation": "auto"}, "truncation", "shorten"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"max_tool_calls": 3}, "max_tool_calls", "not supported"),
        ({"extra_body": {"n": 2}}, "n", "one answer"),
        ({"extra_body": {"prompt_logprobs": 2}}, "prompt_logprobs", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"max_output_tokens": 5000}, "input", "context"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].name", ""),
        ({"input": []}, "input", ""),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].message.content", "text only"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].message.role", "robot"),
        ({"temperature": 200}, "temperature", ""),
    ],
)  # fmt: skip
def test_what_can_not_be_is_told(fields, param, text):
    with pytest.raises(openai.BadRequestError) as caught:
        create(**fields)
    assert caught.value.param == param
    assert text in caught.value.message


def test_what_asks_for_nothing_is_taken():
    response, *_ = create(
        store=False, previous_response_id=None, truncation="disabled", background=False,
        include=[], user="u", service_tier="auto", reasoning={"effort": None}, prompt_cache_key="k",
        extra_body={"stream_options": None, "frobnicate": 1},
    )  # fmt: skip
    assert response.output_text == "Hi é!"


def test_an_unknown_model_is_not_found():
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-5")
