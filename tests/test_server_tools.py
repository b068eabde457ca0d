"""Tools over HTTP: what the model is shown, what is called, and how calls come to the client."""

from __future__ import annotations

import asyncio
import json

import jsonschema
import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.engine.grammar import GrammarCompiler
from nsa_serve.models.checkpoint import resolve
from nsa_serve.request import FinishReason, GrammarKind
from nsa_serve.server.settings import ReasoningParser, ToolCallParser
from nsa_serve.tokenizer import Tokenizer, read_source
from tests.server_fakes import ByteTokenizer, events, fake_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "near": {"$ref": "#/$defs/place"}},
            "required": ["city"],
            "$defs": {"place": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
HERMES = "{% if tools %}<tool_call>{% endif %}"
CALLS = (
    'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


def serve(ask, *, reply="Hi", template=HERMES, **server_settings):
    """(what ``ask`` gives, the engine's requests, the conversation that the template saw)."""

    async def scenario():
        tokenizer = ByteTokenizer(template)
        async with fake_server(tokenizer, max_model_len=4000, **server_settings) as server:
            server.engine.reply = reply
            return await ask(server), server.engine.requests, tokenizer.turns

    return asyncio.run(scenario())


def chat(reply, *, template=HERMES, content="Hello", server=None, **fields):
    """(the choice, the engine's request) of a chat that is answered with ``reply``."""
    fields = {"tools": [WEATHER, TIME], **fields}
    response, requests, _ = serve(
        lambda s: s.chat(content, **fields), reply=reply, template=template, **(server or {})
    )
    assert response.status_code == 200, response.text
    return response.json()["choices"][0], requests[0]


def prompt_of(request):
    return bytes(i for i in request.prompt_token_ids if i < 256).decode()


def test_calls_are_taken_out_of_the_text():
    choice, request = chat(CALLS)
    message = choice["message"]
    assert message["content"] == "Let me look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Köln"}'},
        {"name": "time", "arguments": "{}"},
    ]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"
    assert request.sampling.grammar is None
    assert not request.sampling.skip_special_tokens


def test_a_message_of_calls_alone_has_no_content():
    choice, _ = chat(CALLS.removeprefix("Let me look.\n"))
    assert choice["message"]["content"] is None


def test_text_that_calls_nothing_stays_as_it_is():
    choice, _ = chat("I can't say.")
    assert choice["message"] == {"role": "assistant", "content": "I can't say.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_was_cut_off_ended_by_its_length():
    async def ask(server):
        server.engine.reason = FinishReason.LENGTH
        return await server.chat(tools=[TIME], max_tokens=60)

    response, *_ = serve(
        ask, reply='<tool_call>{"name": "time", "arguments": {"zone": "' + "x" * 99
    )
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"zone": "x')


@pytest.mark.parametrize("reply", [CALLS, "Plain.", "<tool_call>oops</tool_call> é"])
def test_a_stream_joined_is_the_whole_answer(reply):
    choice, _ = chat(reply)
    response, *_ = serve(lambda s: s.chat(tools=[WEATHER, TIME], stream=True), reply=reply)
    chunks = [chunk["choices"][0] for chunk in events(response)]
    content = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    pieces = [piece for chunk in chunks for piece in chunk["delta"].get("tool_calls", [])]
    calls = {}
    for piece in pieces:
        if "id" in piece:
            assert piece["type"] == "function"
            calls[piece["index"]] = dict(piece["function"])
        else:
            assert set(piece["function"]) == {"arguments"}
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    message = choice["message"]
    assert content == (message["content"] or "")
    assert list(calls.values()) == [c["function"] for c in message.get("tool_calls", [])]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    # A byte a chunk: the arguments of the first call came in as many pieces as they have letters.
    assert len(pieces) > 15 or not calls


def test_the_official_client_gathers_streamed_calls():
    async def ask(server):
        manager = server.openai.chat.completions.stream(
            model="fake", messages=[{"role": "user", "content": "hi"}], tools=[WEATHER, TIME]
        )
        async with manager as stream:
            seen = [event.type async for event in stream]
            return seen, (await stream.get_final_completion()).choices[0]

    (seen, choice), *_ = serve(ask, reply=CALLS)
    assert seen.count("tool_calls.function.arguments.done") == 2
    called = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
    assert called == [("weather", '{"city": "Köln"}'), ("time", "{}")]
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")


def test_each_choice_has_its_own_calls():
    response, *_ = serve(lambda s: s.chat(tools=[WEATHER, TIME], n=2), reply=CALLS)
    first, second = (choice["message"]["tool_calls"] for choice in response.json()["choices"])
    assert [len(first), len(second)] == [2, 2]
    assert {call["id"] for call in first}.isdisjoint(call["id"] for call in second)


def test_without_parallel_calls_the_first_one_is_kept():
    choice, _ = chat(CALLS, parallel_tool_calls=False)
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]


def test_tools_are_shown_by_the_models_template():
    _, request = chat("Hi")
    shown = json.loads(prompt_of(request).removeprefix("<tools>").partition("<user>")[0])
    assert shown == [
        WEATHER,
        {
            "type": "function",
            "function": {
                "name": "time",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ]


def test_tools_are_described_in_words_to_a_model_whose_template_has_none():
    choice, request = chat(CALLS, template=None)
    prompt = prompt_of(request)
    assert prompt.startswith("<system>You may call")
    assert '"name": "weather"' in prompt
    assert len(choice["message"]["tool_calls"]) == 2


def test_a_choice_of_none_hides_the_tools_and_leaves_the_text():
    choice, request = chat(CALLS, tool_choice="none")
    assert prompt_of(request) == "<user>Hello<assistant>"
    assert choice["message"]["content"] == CALLS
    assert "tool_calls" not in choice["message"]


def grammar_of(request):
    assert request.sampling.grammar.kind is GrammarKind.JSON
    schema = json.loads(request.sampling.grammar.text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


FORCED = '[{"name": "weather", "arguments": {"city": "Bonn"}}, {"name": "time", "arguments": {}}]'


def test_required_calls_are_a_list_by_grammar():
    choice, request = chat(FORCED, tool_choice="required")
    allowed = grammar_of(request)
    weather, time = json.loads(FORCED)
    deep = {**weather, "arguments": {"city": "a", "near": {"city": "b", "near": None}}}
    broken = {**weather, "arguments": {"city": "a", "near": {"near": None}}}
    assert allowed.is_valid([weather, time])
    assert allowed.is_valid([deep])
    for wrong in ([], [broken], [{"name": "other", "arguments": {}}], [{"name": "time"}], weather):
        assert not allowed.is_valid(wrong)
    assert len(choice["message"]["tool_calls"]) == 2
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


def test_a_named_function_is_the_one_that_is_called():
    one = '[{"name": "weather", "arguments": {"city": "Bonn"}}]'
    choice, request = chat(one, tool_choice=NAMED)
    allowed = grammar_of(request)
    assert allowed.is_valid(json.loads(one))
    assert not allowed.is_valid(json.loads(FORCED))
    assert not allowed.is_valid([{"name": "time", "arguments": {}}])
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("kept", [len('[{"na'), len(FORCED) - len('e", "arguments": {}}]')])
def test_forced_calls_cut_by_their_length_leave_nothing_in_the_content(kept):
    async def ask(server, stream):
        server.engine.reason = FinishReason.LENGTH
        return await server.chat(
            tools=[WEATHER, TIME], tool_choice="required", max_tokens=kept, stream=stream
        )

    whole, *_ = serve(lambda server: ask(server, False), reply=FORCED)
    streamed, *_ = serve(lambda server: ask(server, True), reply=FORCED)
    choice = whole.json()["choices"][0]
    deltas = [chunk["choices"][0]["delta"] for chunk in events(streamed)]
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["content"]
    assert not any(delta.get("content") for delta in deltas)
    assert ("tool_calls" in choice["message"]) == (kept > len(FORCED) // 2)


def test_required_without_parallel_calls_is_one_call():
    _, request = chat(FORCED, tool_choice="required", parallel_tool_calls=False)
    assert not grammar_of(request).is_valid(json.loads(FORCED))


def called(call_id, name, arguments):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"degrees": {"type": "integer"}},
            "additionalProperties": False,
        },
    },
}
ONE = '{"name": "weather", "arguments": {"city": "Köln", "near": {"city": "x"}}}'
OTHER = '{"name": "time", "arguments": {}}'
TAGGED = f"<tool_call>\n{ONE}\n</tool_call>"


@pytest.fixture(scope="module")
def compiler():
    source = read_source(resolve(EngineConfig.from_flags().source), None)
    tokenizer = Tokenizer(source)
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[2]), tokenizer


@pytest.mark.parametrize(
    ("template", "parallel", "allowed", "refused"),
    [
        (
            HERMES,
            True,
            ['{"degrees": 3}', TAGGED, f"{TAGGED}\n<tool_call>\n{OTHER}\n</tool_call>"],
            ['{"degrees": "x"}', "Hello", "<tool_call>\n{}\n</tool_call>", ONE],
        ),
        (
            "<|python_tag|>",
            True,
            ['{"degrees": 3}', ONE, f"{ONE}; {OTHER}"],
            ["Hello", '{"name": "no", "arguments": {}}; {', TAGGED],
        ),
        (HERMES, False, [TAGGED], [f"{TAGGED}\n<tool_call>\n{OTHER}\n</tool_call>"]),
    ],
)
def test_an_answer_of_a_given_form_may_still_be_calls(
    compiler, template, parallel, allowed, refused
):
    compiler, tokenizer = compiler
    fields = {"response_format": ANSWER, "parallel_tool_calls": parallel}
    _, request = chat(TAGGED, template=template, **fields)

    def is_allowed(text):
        matcher = compiler.compile(request.sampling.grammar).matcher
        ids = tokenizer.encode(text, add_special=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert [text for text in allowed if not is_allowed(text)] == []
    assert [text for text in refused if is_allowed(text)] == []


def test_calls_beside_a_form_are_read_and_the_form_is_content():
    choice, _ = chat(TAGGED, response_format=ANSWER)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    choice, _ = chat('{"degrees": 3}', response_format=ANSWER)
    assert choice["message"]["content"] == '{"degrees": 3}'


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a+"},
        {"guided_json": "no JSON"},
        {"response_format": ANSWER, "tool_choice": "required"},
    ],
)
def test_a_form_that_calls_can_not_stand_beside_is_refused(fields):
    response, requests, _ = serve(lambda s: s.chat(tools=[WEATHER], **fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
    assert requests == []


HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "I must look.",
        "tool_calls": [
            called("c1", "weather", '{"city": "Köln"}'),
            called("c2", "time", "not JSON"),
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
]


def test_calls_and_results_come_back_to_the_template_as_it_knows_them():
    response, _, turns = serve(lambda s: s.chat(messages=HISTORY, tools=[WEATHER, TIME]))
    assert response.status_code == 200
    called = turns[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in called] == [{"city": "Köln"}, "not JSON"]
    assert (turns[1]["content"], turns[1]["reasoning_content"]) == ("", "I must look.")
    named = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
    assert turns[2] == named
    assert (turns[3]["name"], turns[3]["content"]) == ("time", "noon")


@pytest.mark.parametrize("template", [None, "{% for t in tools %}{% endfor %}"])
@pytest.mark.parametrize("depth", [150, 250, 990, 50_000])
def test_arguments_of_any_depth_harm_nobody(template, depth):
    deep = called("c", "f", '{"a":' * depth + "1" + "}" * depth)
    messages = [*HISTORY[:1], {"role": "assistant", "tool_calls": [deep]}]
    response, _, turns = serve(lambda s: s.chat(messages=messages), template=template)
    assert response.status_code in (200, 400)
    json.dumps(turns)


def test_calls_and_results_are_told_in_words_where_the_template_knows_none():
    response, _, turns = serve(lambda s: s.chat(messages=HISTORY), template=None)
    assert response.status_code == 200
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}' in turns[1]["content"]
    results = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    assert turns[2]["content"] == results


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": NAMED, "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice.mode"),
    ],
)
def test_tools_that_make_no_sense_are_refused(fields, param):
    response, requests, _ = serve(lambda s: s.chat(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert requests == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"messages": [], "tools": [[[[]]]]}'])
def test_bad_bodies_are_refused(content):
    async def ask(server):
        kind = {"content-type": "application/json"}
        return await server.client.post("/v1/chat/completions", content=content, headers=kind)

    assert serve(ask)[0].status_code == 400


def test_a_form_of_calls_that_is_not_known_is_refused_unless_calls_are_forced():
    def ask(**fields):
        response, *_ = serve(
            lambda s: s.chat(tools=[TIME], **fields), template="[TOOL_CALLS]{{ tools }}"
        )
        return response

    assert "--tool-call-parser" in ask().json()["error"]["message"]
    assert ask(tool_choice="required").status_code == 200


@pytest.mark.parametrize("template", ['{"parameters": {{ tools }}', "<|python_tag|>"])
def test_the_form_of_calls_is_read_off_the_template(template):
    call = '{"name": "time", "parameters": {}}'
    choice, _ = chat(call, template=template)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"


def test_the_flag_outranks_the_template():
    call = '{"name": "time", "parameters": {}}'
    choice, _ = chat(call, server={"tool_call_parser": ToolCallParser.LLAMA3_JSON})
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"


def test_reasoning_is_apart_from_content_and_calls():
    reply = f"<think>\nHm, <tool_call>?\n</think>\n\n{CALLS}"
    choice, _ = chat(reply, server={"reasoning_parser": ReasoningParser.QWEN3})
    message = choice["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Hm, <tool_call>?"
    assert message["content"] == "Let me look."
    assert len(message["tool_calls"]) == 2


def test_reasoning_is_streamed_apart():
    response, *_ = serve(
        lambda s: s.chat(stream=True),
        reply="a b\n</think>\n\nYes.",
        reasoning_parser=ReasoningParser.DEEPSEEK_R1,
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
    joined = {
        key: "".join(delta.get(key, "") for delta in deltas)
        for key in ("reasoning_content", "reasoning", "content")
    }
    assert joined == {"reasoning_content": "a b", "reasoning": "a b", "content": "Yes."}


def test_a_prompt_that_ends_the_thinking_leaves_the_text_alone():
    response, *_ = serve(
        lambda s: s.chat(chat_template_kwargs={"begin": "<think>\n\n</think>\n\n"}),
        reply="a</think>b",
        reasoning_parser=ReasoningParser.DEEPSEEK_R1,
    )
    message = response.json()["choices"][0]["message"]
    assert message["content"] == "a</think>b"
    assert "reasoning" not in message


def test_forced_calls_come_without_reasoning():
    choice, _ = chat(
        FORCED, tool_choice="required", server={"reasoning_parser": ReasoningParser.DEEPSEEK_R1}
    )
    assert len(choice["message"]["tool_calls"]) == 2


def test_logprobs_of_held_back_text_are_not_lost():
    response, *_ = serve(
        lambda s: s.chat(tools=[WEATHER, TIME], stream=True, logprobs=True), reply=CALLS
    )
    entries = [
        entry
        for chunk in events(response)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == CALLS


def test_tokenize_counts_the_tools():
    async def ask(server):
        body = {"messages": [{"role": "user", "content": "hi"}]}
        bare = await server.post("/tokenize", body)
        return bare.json()["count"], (
            await server.post("/tokenize", {**body, "tools": [TIME]})
        ).json()

    (count, shown), *_ = serve(ask)
    assert shown["count"] > count
