"""Structured output as clients ask for it: OpenAI's response_format, vLLM's fields, old and new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from msgspec.json import encode
from msgspec.structs import replace
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ..errors import InvalidParameter
from ..request import JSON_OBJECT, GrammarKind, GrammarSpec
from .body import Body, Strict
from .settings import MAX_CHOICE_CHARS, MAX_CHOICE_TEXTS

Schema = dict[str, Any]
ChoiceText = Annotated[str, Field(max_length=MAX_CHOICE_CHARS)]
ChoiceTexts = Annotated[
    list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)
]


def _no_number(value: Any) -> Any:
    # A literal is compared with ==, and 0 equals False.
    if value is not None and not isinstance(value, bool):
        raise ValueError("must be a boolean")
    return value


Off = Annotated[Literal[False] | None, BeforeValidator(_no_number)]


class JsonSchemaFormat(Strict):
    """A schema that the text must satisfy. ``strict`` is what it always is here."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, which needs it")
        return self

    def grammar(self) -> GrammarSpec | None:
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return schema_grammar(schema, "response_format")


def schema_grammar(schema: Schema | None, param: str) -> GrammarSpec:
    """A schema, whose keys keep their order; None: any JSON object. It came in field ``param``."""
    if schema is None:
        return replace(JSON_OBJECT, param=param)
    return GrammarSpec(GrammarKind.JSON, encode(schema).decode(), param)


class StructuredOutputs(Strict):
    """vLLM's field: exactly one of these. A schema is an object, or its text."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    # Which library follows the grammar is ours to say; what else it could do isn't built.
    disable_fallback: bool | None = None
    disable_any_whitespace: Off = None
    disable_additional_properties: Off = None
    whitespace_pattern: None = None
    structural_tag: None = None

    def grammars(self) -> Iterator[GrammarSpec]:
        """All that are given; one is allowed."""
        yield from _specs(
            {
                GrammarKind.JSON: ("structured_outputs", self.json_),
                GrammarKind.REGEX: ("structured_outputs", self.regex),
                GrammarKind.CHOICE: ("structured_outputs", self.choice),
                GrammarKind.GRAMMAR: ("structured_outputs", self.grammar),
            }
        )
        if self.json_object:
            yield schema_grammar(None, "structured_outputs")


class StructuredFields(Body):
    """The fields of a request's body that say what its text must be: at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: str | None = None

    def grammar(self) -> GrammarSpec | None:
        """What the text must be. Raises ``InvalidParameter`` where two fields say it."""
        found = list(self._grammars())
        if len(found) > 1:
            raise InvalidParameter(
                f"{found[0].param} and {found[1].param} both say what the text must be; send one",
                param=found[1].param,
            )
        return found[0] if found else None

    def _grammars(self) -> Iterator[GrammarSpec]:
        formatted = None if self.response_format is None else self.response_format.grammar()
        if formatted is not None:
            yield formatted
        if self.structured_outputs is not None:
            yield from self.structured_outputs.grammars()
        yield from _specs(
            {
                GrammarKind.JSON: ("guided_json", self.guided_json),
                GrammarKind.REGEX: ("guided_regex", self.guided_regex),
                GrammarKind.CHOICE: ("guided_choice", self.guided_choice),
                GrammarKind.GRAMMAR: ("guided_grammar", self.guided_grammar),
            }
        )


def _specs(given: Mapping[GrammarKind, tuple[str, Any]]) -> Iterator[GrammarSpec]:
    """The grammars among (field, value) pairs; what is no text is sent as JSON, its keys in the
    order in which they came."""
    for kind, (param, value) in given.items():
        if value is not None:
            text = value if isinstance(value, str) else encode(value).decode()
            yield GrammarSpec(kind, text, param)
