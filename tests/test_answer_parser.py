"""From an answer's text to reasoning, content and calls, however the text was cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_serve.server.answer.call_parser import CALL_LIST, HERMES, LLAMA3_JSON, CallParser
from nsa_serve.server.answer.events import Answer, CallArguments, CallBegun, Content
from nsa_serve.server.answer.parser import AnswerParser
from nsa_serve.server.answer.reasoning import ReasoningSplitter, reasoning_splitter
from nsa_serve.server.settings import ReasoningParser

NAMES = frozenset(("weather", "add"))
FORMS = {"hermes": HERMES, "llama": LLAMA3_JSON, "list": CALL_LIST}


def parser(form=HERMES, *, opened=None, single=False):
    splitter = None if opened is None else ReasoningSplitter(opened=opened)
    calls = None if form is None else CallParser(form, NAMES)
    return AnswerParser(splitter, calls, single=single)


def read(pieces, make):
    """(reasoning, content, [(name, arguments)]) of an answer that comes in these pieces."""
    machine = make()
    events = [event for piece in pieces for event in machine.feed(piece)] + machine.finish()
    answer = Answer.of(events)
    indices = [event.index for event in events if isinstance(event, CallBegun)]
    assert indices == list(range(len(answer.calls)))
    assert machine.num_calls >= len(answer.calls)
    calls = [(call.name, call.arguments) for call in answer.calls]
    return answer.reasoning, answer.content, calls


def call(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments})


SUM = call("add", {"a": 1, "b": [2, {"c": '"}]\\'}]})
RAIN = call("weather", {"city": "Köln"})
ARGUMENTS = [json.dumps({"a": 1, "b": [2, {"c": '"}]\\'}]}), json.dumps({"city": "Köln"})]
BOTH = [("add", ARGUMENTS[0]), ("weather", ARGUMENTS[1])]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"<tool_call>\n{SUM}\n</tool_call>\n<tool_call>\n{RAIN}\n</tool_call>\n", ""),
        (f"Let me see.\n<tool_call>{SUM}</tool_call><tool_call>{RAIN}</tool_call>", "Let me see."),
        (f"<tool_call>[{SUM}, {RAIN}]</tool_call> Done.", "Done."),
        (f"<tool_call>{SUM}\n{RAIN}</tool_call>", ""),
        (f"<tool_call>{SUM}\n<tool_call>{RAIN}", ""),
        (f"a\n\n<tool_call>{SUM}</tool_call> b <tool_call>{RAIN}</tool_call>\nc", "a\n\n b \nc"),
    ],
)
def test_hermes_calls_stand_between_marks(text, content):
    assert read([text], parser) == ("", content, BOTH)


@pytest.mark.parametrize(
    "text", [f"{SUM}; {RAIN}", f"<|python_tag|>{SUM};{RAIN}", f"\n{SUM}\n{RAIN}", f"[{SUM},{RAIN}]"]
)
def test_llama_calls_are_bare_objects(text):
    assert read([text], lambda: parser(LLAMA3_JSON)) == ("", "", BOTH)


def test_a_constrained_list_is_calls():
    assert read([f"[{SUM}, {RAIN}]"], lambda: parser(CALL_LIST)) == ("", "", BOTH)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "add"}', "{}"),
        ('{"name": "add", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"arguments": {"a" : 1}, "name": "add"}', '{"a" : 1}'),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "add", "arguments": null}', "{}"),
        ('{"arguments": "", "id": -1.5e3, "x": [[{}]], "name": "add"}', "{}"),
    ],
)
def test_a_call_may_be_written_in_many_ways(text, arguments):
    assert read([f"<tool_call>{text}</tool_call>"], parser) == ("", "", [("add", arguments)])


NO_CALLS = [
    "<tool_call>oops</tool_call>",
    "<tool_call>",
    "<tool_call>\n[",
    "<tool_ca",
    "<tool_call></tool_call>",
    "<tool_call>{}</tool_call>",
    f"<tool_call>{call('unknown', {'a': 1})}</tool_call>",
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": 1}</tool_call>',
    '<tool_call>{"arguments": {"a": 1}, "name": "unknown"}',
    '<tool_call>{"arguments": {"a": 1}}',
    '<tool_call>{"arguments": "\\ud800", "name": "add"}',
    '<tool_call>{"name": "add", "name": "add", "arguments": {}}',
    '<tool_call>{"name" "add"}',
    '<tool_call>{"name": "add",}',
    "<tool_call>{'name': 'add'}",
    '<tool_call>{"x": ' + "[" * 5000 + "]" * 5000 + ', "name": "none"}',
    '<tool_call>{"name": "ad',
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(text):
    assert read([text], parser) == ("", text, [])
    assert read(text, parser) == ("", text, [])


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"a": 1} is JSON', " {", "[", '{"name": "John", "age": 3}', "plain", " \n"]
)
def test_json_that_calls_nothing_is_content(text):
    assert read([text], lambda: parser(LLAMA3_JSON)) == ("", text, [])


def test_a_call_that_is_cut_off_keeps_its_arguments_so_far():
    text = '<tool_call>{"name": "add", "arguments": {"a": "x'
    assert read([text], parser) == ("", "", [("add", '{"a": "x')])


@pytest.mark.parametrize("stop", range(len(f"[{SUM}, {RAIN}]")))
def test_a_list_of_calls_that_is_cut_anywhere_has_no_content(stop):
    text = f"[{SUM}, {RAIN}]"[:stop]
    _, content, calls = read([text], lambda: parser(CALL_LIST))
    assert content == ""
    for (name, arguments), (whole_name, whole) in zip(calls, BOTH, strict=False):
        assert name == whole_name
        assert whole.startswith(arguments)
    assert len(calls) == text.count('"arguments": {')


def test_text_that_breaks_a_begun_call_is_content():
    text = '<tool_call>{"name": "add", "arguments": {"a": 1} oops</tool_call>'
    _, content, calls = read([text], parser)
    assert (content, calls) == ("oops</tool_call>", [("add", '{"a": 1}')])


def test_arguments_are_given_out_as_they_come():
    machine = parser()
    machine.feed('<tool_call>{"name": "add", "arguments": ')
    assert machine.feed('{"a"') == [CallBegun(0, "add"), CallArguments(0, '{"a"')]
    assert machine.feed(": 1") == [CallArguments(0, ": 1")]
    assert machine.feed("}}") == [CallArguments(0, "}")]


def test_content_is_given_out_as_it_comes():
    machine = parser(opened=False)
    assert machine.feed("Hello <") == [Content("Hello")]
    assert machine.feed("b> you") == [Content(" <b> you")]


def test_one_call_is_kept_where_parallel_calls_are_not_wanted():
    text = f"<tool_call>{SUM}</tool_call><tool_call>{RAIN}</tool_call>"
    assert read([text], lambda: parser(single=True)) == ("", "", BOTH[:1])


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        (False, "<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        (True, "hm\n</think>\n\nYes.", "hm", "Yes."),
        (True, "\n<think>hm</think>Yes.", "hm", "Yes."),
        (True, "hm, a </thin", "hm, a </thin", ""),
        (True, "<thi", "<thi", ""),
        (False, "<thi", "", "<thi"),
        (False, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (True, "a</think>b</think>", "a", "b</think>"),
        (True, "</think>Yes.", "", "Yes."),
    ],
)
def test_reasoning_ends_at_its_mark(opened, text, reasoning, content):
    def make():
        return parser(None, opened=opened)

    assert read([text], make) == (reasoning, content, [])
    assert read(text, make) == (reasoning, content, [])


def test_calls_are_looked_for_after_the_reasoning_only():
    tagged = f"<tool_call>{RAIN}</tool_call>"
    text = f"<think>\nI could say {tagged}\n</think>\n\n{tagged}"
    expected = (f"I could say {tagged}", "", BOTH[1:])
    assert read([text], lambda: parser(opened=False)) == expected
    bare = f"<think>x</think>\n{RAIN}"
    assert read([bare], lambda: parser(LLAMA3_JSON, opened=False)) == ("x", "", BOTH[1:])


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "reasoning"),
    [
        ("qwen3", "<assistant>", "a</think>b", ""),
        ("qwen3", "<assistant><think>\n", "a</think>b", "a"),
        ("deepseek_r1", "<assistant>", "a</think>b", "a"),
        ("deepseek_r1", "<think>\n\n</think>\n\n", "a</think>b", ""),
        ("qwen3", "<think></think>", "<think>a</think>b", ""),
    ],
)
def test_the_prompt_says_whether_the_model_thinks(kind, prompt, text, reasoning):
    splitter = reasoning_splitter(ReasoningParser(kind), prompt)
    assert read([text], lambda: AnswerParser(splitter, None))[0] == reasoning


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "\n", " ", ";", ",",
    "[", "]", "{", "}", '"', "\\", ":", '{"name": ', '"add"', '"weather"', '"arguments": ',
    '"parameters": ', '{"a": 1}', '"{}"', "null", "1.5", "text", "é", "<", "tool_call>",
    SUM, RAIN, f"<tool_call>\n{SUM}\n</tool_call>", call("unknown", {}),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
MACHINES = st.tuples(st.sampled_from([*FORMS, None]), st.sampled_from([None, True, False]))


@given(text=TEXTS, machine=MACHINES, cuts=st.sets(st.integers(0, 300), max_size=12))
@settings(max_examples=400)
@example(text=f"<tool_call>\n{SUM}\n</tool_call>", machine=("hermes", False), cuts=set(range(99)))
def test_the_result_does_not_depend_on_how_the_text_was_cut(text, machine, cuts):
    name, opened = machine

    def make():
        return parser(FORMS.get(name), opened=opened)

    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(at)]
    whole = read([text], make)
    assert read(pieces, make) == whole
    assert read(text, make) == whole


SPACING = str.maketrans("", "", " \t\r\n")


@given(text=TEXTS, form=st.sampled_from(["hermes", "llama"]))
@settings(max_examples=400)
def test_without_a_call_the_content_is_the_text(text, form):
    _, content, calls = read([text], lambda: parser(FORMS[form]))
    if not calls:
        assert content == text
        return
    # With calls, content is the text without the calls, in order.
    remains = iter(text.translate(SPACING))
    assert all(char in remains for char in content.translate(SPACING))


@given(
    words=st.lists(st.sampled_from(["Hello", "{x}", "[1]", "a < b", "é"]), max_size=3),
    calls=st.lists(
        st.tuples(
            st.sampled_from(sorted(NAMES)),
            st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    space=st.text(" \n", max_size=2),
    ascii_only=st.booleans(),
)
@settings(max_examples=200)
def test_every_call_that_is_written_is_read(words, calls, space, ascii_only):
    dumped = [(n, json.dumps(a, ensure_ascii=ascii_only)) for n, a in calls]
    written = [
        f'<tool_call>{space}{{"name":{space}"{n}", "arguments": {a}{space}}}{space}</tool_call>'
        for n, a in dumped
    ]
    prose = " ".join(words)
    text = prose + space + space.join(written)
    assert read([text], parser) == ("", prose, dumped)
