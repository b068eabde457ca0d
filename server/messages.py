"""The turns of a conversation as clients send them, and as chat templates know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import from_json

from .body import Strict
from .errors import bounded
from .settings import MAX_TOOLS


class TextPart(Strict):
    type: Literal["text"]
    text: str


def joined_text(value: object, kinds: Mapping[str, str]) -> object:
    """Content as one string: its parts joined by a newline, other values as they are.

    ``kinds`` maps the types of parts to the field with their text; other types are refused.
    """
    if not isinstance(value, list):
        return value
    return "\n".join(_part_text(position, part, kinds) for position, part in enumerate(value))


def _part_text(position: int, part: object, kinds: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise ValueError(
            f"part {position} is of type {bounded(kind, 64)!r}, and this model takes text only"
        )
    text = part.get(kinds[kind]) if isinstance(part, dict) and isinstance(kind, str) else None
    if not isinstance(text, str):
        shown = next(iter(kinds))
        raise ValueError(f'part {position} must look like {{"type": "{shown}", "text": "…"}}')
    return text


Content = Annotated[
    str | None,
    BeforeValidator(lambda value: joined_text(value, {"text": "text"})),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": TextPart.model_json_schema()},
                {"type": "null"},
            ]
        }
    ),
]
Name = Annotated[str, Field(max_length=256)]


class CalledFunction(Strict):
    name: Name
    arguments: str  # JSON, as far as the model kept to it


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, so they get the object."""
        function = {"name": self.function.name, "arguments": arguments_of(self.function.arguments)}
        named = {"id": self.id} if self.id else {}
        return {**named, "type": "function", "function": function}


def arguments_of(text: str) -> Any:
    """The object that a call's arguments are, or their text where they are none."""
    try:
        # Bounded in depth, so that templates can write it again.
        parsed = from_json(text or "{}")
    except ValueError:
        return text
    return parsed if isinstance(parsed, dict) else text


class Message(Strict):
    """One turn of a conversation, text only."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of the same

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        for name in ("function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} in messages is not supported here")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are of the assistant, not of role {self.role}")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is required in a message of role {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as templates know it: "developer" is OpenAI's newer word for "system"."""
        thought = self.reasoning_content or self.reasoning
        given = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": thought,
            "reasoning": thought,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()],
        }
        role = "system" if self.role == "developer" else self.role
        extra = {name: value for name, value in given.items() if value}
        return {"role": role, "content": self.content or "", **extra}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation for templates. Results of calls get the names of what was called, which
    some templates need and OpenAI's messages leave out."""
    called = {c.id: c.function.name for m in messages for c in m.tool_calls or () if c.id}
    turns = [message.for_template() for message in messages]
    for turn in turns:
        name = called.get(turn.get("tool_call_id", ""))
        if turn["role"] == "tool" and name:
            turn.setdefault("name", name)
    return turns
