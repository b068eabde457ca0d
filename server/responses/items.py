"""The items of a conversation as the Responses API has them, and as messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from ..body import Strict
from ..messages import CalledFunction, Message, Name, ToolCall, joined_text

_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def _text(value: object) -> object:
    return joined_text(value, _PARTS)


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
ItemText = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemText


class CallItem(Strict):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str


class CallOutputItem(Strict):
    """What that call gave."""

    type: Literal["function_call_output"]
    call_id: Name
    output: ItemText


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What an earlier response thought. Summaries and encrypted content are not of this server."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


def _kind(value: Any) -> Any:
    return value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def _listed(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[Item],
    Field(min_length=1, max_length=4096, fail_fast=True),
    BeforeValidator(_listed, json_schema_input_type=str | list[Item]),
]


def messages_of(items: Iterable[Item], instructions: str | None) -> list[Message]:
    """The conversation as messages, which chat templates know.

    What the assistant thought, said and called between two turns of others is one message.
    """
    messages: list[Message] = []
    draft = _Draft()
    for item in items:
        if isinstance(item, CallOutputItem):
            messages.extend(draft.take())
            result = Message(role="tool", content=item.output, tool_call_id=item.call_id)
            messages.append(result)
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.extend(draft.take())
            messages.append(Message(role=item.role, content=item.content))
        else:
            messages.extend(draft.add(item))
    return _instructed([*messages, *draft.take()], instructions)


def _instructed(messages: list[Message], instructions: str | None) -> list[Message]:
    """With the instructions before all else, in one system message, as templates want it."""
    if not instructions:
        return messages
    if messages and messages[0].role in ("system", "developer"):
        first = messages.pop(0)
        instructions = f"{instructions}\n\n{first.content}"
    return [Message(role="system", content=instructions), *messages]


class _Draft:
    """The assistant's items since the last turn of somebody else."""

    def __init__(self) -> None:
        self._given: dict[str, Any] = {}

    def add(self, item: MessageItem | CallItem | ReasoningItem) -> Iterator[Message]:
        """Take an item in; gives the message before it where they can't be one."""
        match item:
            case MessageItem():
                if self._given.keys() - {"reasoning_content"}:
                    yield from self.take()
                self._given["content"] = item.content
            case CallItem():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                calls = self._given.setdefault("tool_calls", [])
                calls.append(ToolCall(id=item.call_id, function=function))
            case ReasoningItem():
                if self._given:
                    yield from self.take()
                texts = "\n".join(part.text for part in item.content or ())
                self._given |= {"reasoning_content": texts} if texts else {}

    def take(self) -> Iterator[Message]:
        if self._given:
            yield Message(role="assistant", **self._given)
        self._given = {}
