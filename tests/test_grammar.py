"""Grammars of each kind, token by token: what a mask allows, and what can't be compiled."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.engine import grammar as grammar_module
from nsa_serve.engine.grammar import MAX_COMPILED, MAX_GRAMMAR_BYTES, check_grammar
from nsa_serve.engine.regex_size import expanded_size
from nsa_serve.errors import InvalidParameter
from nsa_serve.request import JSON_OBJECT, GrammarKind, GrammarSpec
from tests.byte_grammars import (
    EOS,
    MARK,
    VOCAB,
    allowed,
    byte_compiler,
    choice,
    grammar,
    regex,
    schema,
)

COMPILER = byte_compiler()


def after(spec: GrammarSpec, text: str) -> list[int] | None:
    """Tokens allowed behind ``text``; [] where it is complete, None where it isn't allowed."""
    compiled = COMPILER.compile(spec)
    tokens = allowed(compiled.mask)
    for byte in text.encode():
        if byte not in tokens:
            return None
        assert compiled.matcher.consume_token(byte)
        if compiled.matcher.is_stopped():
            tokens = []
        else:
            tokens = allowed(COMPILER.mask_of(compiled.matcher))
    return tokens


def accepts(spec: GrammarSpec, text: str) -> bool:
    tokens = after(spec, text)
    return tokens is not None and (not tokens or EOS in tokens)


def refusal(spec: GrammarSpec) -> str:
    with pytest.raises(InvalidParameter) as caught:
        COMPILER.compile(spec)
    assert caught.value.param == spec.param
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    return str(caught.value)


texts = st.text('abx-\né\\"/ ', max_size=6)


@given(st.lists(texts, min_size=1, max_size=5), st.text("abx-\né", max_size=3))
@settings(max_examples=60)
def test_a_mask_allows_exactly_the_next_bytes_of_the_choices(choices, start):
    spec = choice(*choices)
    encoded = [text.encode() for text in choices]
    begun = [text[len(start.encode()) :] for text in encoded if text.startswith(start.encode())]
    expected = {rest[0] for rest in begun if rest} | ({EOS} if b"" in begun else set())
    found = after(spec, start)
    if found is None:
        assert not begun
    elif found == []:  # nothing can follow, so no mask is needed
        assert expected == {EOS}
    else:
        assert set(found) == expected


PATTERNS = [r"a+b?", r"(ab|a)*x", r"[^a]{2}", r"\d{1,2}-x", r"x|ab$", r"^ab", r"a/b", r"\\|\"", ""]


@given(st.sampled_from(PATTERNS), st.text('ab1x-/é\\"', max_size=5))
@settings(max_examples=150)
def test_a_pattern_accepts_what_python_matches_as_a_whole(pattern, text):
    python = re.compile(pattern, re.ASCII)
    assert accepts(regex(pattern), text) == bool(python.fullmatch(text))


def test_digits_of_other_scripts_are_no_digits():
    assert accepts(regex(r"\d"), "7")
    assert not accepts(regex(r"\d"), "\u0667")


@pytest.mark.parametrize(
    "text", ['start: "a" /[0-9]/+ ("x" | "y")', 'root ::= "a" [0-9]+ ("x" | "y")']
)
def test_lark_and_gbnf_say_the_same(text):
    spec = grammar(text)
    assert accepts(spec, "a12x")
    assert not accepts(spec, "ax")
    assert set(after(spec, "a1")) == set(b"0123456789xy")


def test_a_lark_grammar_may_hold_a_schema_between_marks():
    spec = grammar('start: "<call>" %json {"type": "integer"} "</call>"')
    assert accepts(spec, "<call>12</call>")
    assert not accepts(spec, '<call>"a"</call>')


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name":"A","age":3}', True),
        ('{"name": "é\\n", "age": 3}', True),
        ('{\n  "name": "A",\n  "age": 3\n}', True),
        ('{"age":3,"name":"A"}', False),  # properties come in the schema's order
        ('{"name":"A"}', False),
        ('{"name":"A","age":-3}', False),
        ('{"name":"A","age":3,"more":1}', False),
        ('{"name":"A","age":3} ', False),
        ('[]', False),
    ],
)  # fmt: skip
def test_a_schema_accepts_its_objects_alone(text, valid):
    assert accepts(schema(PERSON), text) == valid


def test_any_object_is_a_json_object_and_nothing_else_is():
    assert accepts(JSON_OBJECT, '{"a": [1, {"b": null}]}')
    assert not accepts(JSON_OBJECT, "[1]")
    assert not accepts(JSON_OBJECT, "1")


def test_white_space_between_values_is_bounded():
    assert after(JSON_OBJECT, "{" + " " * 20 + '"a"') is not None
    assert after(JSON_OBJECT, "{" + " " * 21) is None


def test_special_tokens_and_rows_without_a_token_are_never_allowed():
    tokens = after(regex(r"(?s:.)*"), "a")
    assert {EOS, *b"<|mark>"} <= set(tokens)
    assert not set(range(MARK, VOCAB)) & set(tokens)


def test_a_special_token_is_allowed_where_a_grammar_names_it():
    assert after(grammar('start: "a" <|mark|> "b"'), "a") == [MARK]


def test_a_matcher_of_ones_own_leaves_the_kept_one_where_it_was():
    spec = choice("ab", "cd")
    first = COMPILER.compile(spec)
    assert first.matcher.consume_token(ord("a"))
    assert allowed(COMPILER.mask_of(COMPILER.compile(spec).matcher)) == [ord("a"), ord("c")]
    assert allowed(COMPILER.mask_of(first.matcher)) == [ord("b")]


def test_the_last_grammars_are_kept_and_no_more():
    compiler = byte_compiler()
    for number in range(MAX_COMPILED + 3):
        compiler.compile(choice(f"text {number}"))
    assert len(compiler._compiled) == MAX_COMPILED
    kept = {json.loads(text)[0] for _, text in compiler._compiled}
    assert "text 2" not in kept
    assert {"text 3", f"text {MAX_COMPILED + 2}"} <= kept


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (regex("(["), "unclosed character class"),
        (regex("(?=a)b"), "regex parse error"),
        (GrammarSpec(GrammarKind.JSON, "{"), "no valid JSON"),
        (GrammarSpec(GrammarKind.JSON, "3"), "an object"),
        (GrammarSpec(GrammarKind.JSON, "[" * 30_000), "no valid JSON"),
        (schema({"type": "blob"}), "Invalid type: blob"),
        (schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema(False), "must be an object"),
        (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "nsatisfiable"),
        (schema({"x-guidance": {"item_separator": 3}}), "expected a string"),
        (schema({"$ref": "http://localhost/x.json"}), "not fetch"),
        (schema({"$ref": "#/$defs/none"}), "none"),
        (schema({"$ref": "#"}), "NoExtension"),
        (GrammarSpec(GrammarKind.CHOICE, "[]"), "at least one"),
        (GrammarSpec(GrammarKind.CHOICE, '["a", 1]'), "must be a string"),
        (GrammarSpec(GrammarKind.CHOICE, '"a"'), "list"),
        (grammar("start: foo"), "unknown name"),
        (grammar('start: "a'), "1("),
        (grammar("start: start"), "NoExtension"),
        (grammar("root ::= ((((" + "(" * 30_000), "GBNF"),
        (grammar("root ::= %%%"), "GBNF"),
    ],
)
def test_what_can_not_be_compiled_is_refused_in_one_line(spec, words):
    assert words in refusal(spec)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0), ("abc", 3), (r"\d{4}-[0-9\]]{2}", 7), ("(ab){3,5}", 10), ("(a{2}b){3}|c", 10),
        ("((a{10}){10}){10}x", 1001), (r"\(a{3}\{2}", 5 + 2), ("(?i)(?:ab){2,}", 1 + 6),
        (r"\p{L}{9}", 9), (r"[(a{9}]{2}", 2), ("a{99999999999}", 10**12), ("){3}", 1 + 2),
    ],
)  # fmt: skip
def test_the_size_of_a_pattern_counts_its_repetitions(pattern, size):
    assert expanded_size(pattern) == size


@pytest.mark.parametrize(
    "spec",
    [
        regex("(a{1000}){1000}"),
        schema({"type": "string", "pattern": "^(a{1000}){1000}$"}),
        schema({"items": {"patternProperties": {"(a{1000}){1000}": {}}}}),
        grammar('start: "x" /(a{1000}){1000}/'),
    ],
)
def test_repetitions_that_would_fill_the_memory_are_refused(spec):
    assert "repetitions written out has 10" in refusal(spec)


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        value = {"items": value}
    return value


def test_schemas_are_bounded_in_depth():
    assert COMPILER.compile(schema(nested(62))).mask
    assert "levels deep" in refusal(schema(nested(64)))


def test_grammars_are_bounded_in_bytes_not_in_characters():
    check_grammar(regex("é" * (MAX_GRAMMAR_BYTES // 2)))
    with pytest.raises(InvalidParameter, match=f"at most {MAX_GRAMMAR_BYTES}"):
        check_grammar(regex("é" * (MAX_GRAMMAR_BYTES // 2) + "a"))
    check_grammar(regex("\ud800"))  # a lone surrogate counts as something


def test_a_grammar_that_takes_too_long_is_not_kept(monkeypatch):
    monkeypatch.setattr(grammar_module, "COMPILE_CPU_SECONDS", 0.0)
    spec = choice("slow to compile")
    assert "too complex" in refusal(spec)
    monkeypatch.undo()
    assert accepts(spec, "slow to compile")
