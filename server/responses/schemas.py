"""Body of ``POST /v1/responses``: OpenAI's fields, with the sampling fields of the other routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from ...errors import InvalidParameter
from ...request import GrammarSpec
from ..body import Strict
from ..schemas import GenerationRequest, TemplateArguments
from ..settings import MAX_TOOLS
from ..structured import schema_grammar
from ..tools.schemas import (
    FunctionDefinition,
    FunctionName,
    NamedChoice,
    NamedFunction,
    Tool,
    ToolChoice,
)
from .items import Input

_KEEPS_NOTHING = "this server keeps no responses: send the whole conversation as input"

# Fields that would need what isn't here, and the values with which they ask for nothing.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), f"store: true is not supported; {_KEEPS_NOTHING}"),
    "previous_response_id": ((), f"previous_response_id is not supported; {_KEEPS_NOTHING}"),
    "conversation": ((), f"conversation is not supported; {_KEEPS_NOTHING}"),
    "background": ((False,), f"background: true is not supported; {_KEEPS_NOTHING}"),
    "prompt": ((), "prompt is not supported; send instructions and input"),
    "truncation": (("disabled",), "truncation is not supported; shorten the input"),
    "include": (([], ["reasoning.encrypted_content"]), "include is not supported here"),
    "reasoning": (({},), "reasoning is not supported here; see chat_template_kwargs"),
    "top_logprobs": ((0,), "top_logprobs is not supported here; see /v1/chat/completions"),
    "max_tool_calls": ((), "max_tool_calls is not supported: no tool runs on this server"),
    "context_management": (([],), "context_management is not supported here"),
}


class FunctionTool(FunctionDefinition):
    """A function, whose fields stand beside its type here."""

    type: Literal["function"]

    def as_chat_tool(self) -> Tool:
        fields = {name: getattr(self, name) for name in FunctionDefinition.model_fields}
        return Tool(type="function", function=FunctionDefinition(**fields))


class FunctionChoice(Strict):
    type: Literal["function"]
    name: FunctionName


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[FunctionChoice, Tag("function")],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "function"),
]


class TextFormat(Strict):
    """response_format, with the fields of the schema beside its type."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema belongs to type json_schema, which needs it")
        return self


class TextOptions(Strict):
    """How the answer's text is to be; ``verbosity`` asks for what a model here can't give."""

    format: TextFormat | None = None
    verbosity: None = None


class ResponsesRequest(GenerationRequest):
    """What is said next after ``input``."""

    known_names: ClassVar[frozenset[str]] = GenerationRequest.known_names | _REFUSED.keys()

    input: Input
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    text: TextOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        for name, (neutral, message) in _REFUSED.items():
            value = _without_nulls((self.model_extra or {}).get(name))
            if value is not None and value not in neutral:
                raise InvalidParameter(message, param=name)
        if self.num_choices > 1:
            raise InvalidParameter("a response is one answer; n must be 1", param="n")
        if self.prompt_logprobs is not None:
            raise InvalidParameter("prompt_logprobs is not supported here", param="prompt_logprobs")
        return self

    def _grammars(self) -> Iterator[GrammarSpec]:
        yield from super()._grammars()
        wanted = self.text.format if self.text is not None else None
        if wanted is not None and wanted.type != "text":
            yield schema_grammar(wanted.schema_, "text")

    @property
    def limit(self) -> int | None:
        """The most tokens wanted; None: as many as the context holds."""
        return self.max_output_tokens or self.max_tokens

    @property
    def chat_tools(self) -> list[Tool]:
        return [tool.as_chat_tool() for tool in self.tools or ()]

    @property
    def chat_choice(self) -> ToolChoice | None:
        if isinstance(self.tool_choice, FunctionChoice):
            return NamedChoice(type="function", function=NamedFunction(name=self.tool_choice.name))
        return self.tool_choice


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value
