"""What an assistant said, as OpenAI's chat messages and deltas."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from . import replies
from .answer.events import Answer, CallArguments, CallBegun, Content, Event, Reasoning


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def message_of(answer: Answer) -> replies.AssistantMessage:
    """A whole message: content is null where there are calls and nothing else."""
    calls = [
        replies.ToolCall(
            id=new_call_id(),
            type="function",
            function=replies.CalledFunction(name=call.name, arguments=call.arguments),
        )
        for call in answer.calls
    ]
    reasoning = answer.reasoning
    extra: dict[str, Any] = (
        {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
    )
    if calls:
        extra["tool_calls"] = calls
    return replies.AssistantMessage(
        role="assistant",
        content=answer.content if answer.content or not calls else None,
        refusal=None,
        **extra,
    )


def delta_of(events: Sequence[Event]) -> replies.Delta:
    """The events of one output as one delta."""
    match events:
        case [Content(text)]:  # nearly all of a stream
            return replies.Delta(content=text)
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls = _delta_calls(events)
    return replies.Delta(
        content=content or UNSET,
        reasoning_content=reasoning or UNSET,
        reasoning=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _delta_calls(events: Sequence[Event]) -> list[replies.DeltaCall]:
    """Pieces of calls: arguments that come with their call's beginning are part of its piece."""
    pieces: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case CallBegun(index, name):
                pieces[index] = {"id": new_call_id(), "type": "function", "name": name, "text": ""}
            case CallArguments(index, text):
                piece = pieces.setdefault(index, {"text": ""})
                piece["text"] += text
    return [_delta_call(index, piece) for index, piece in pieces.items()]


def _delta_call(index: int, piece: dict[str, Any]) -> replies.DeltaCall:
    named = {"name": piece["name"]} if "name" in piece else {}
    begun = {key: piece[key] for key in ("id", "type") if key in piece}
    function = replies.CalledFunction(**named, arguments=piece["text"])
    return replies.DeltaCall(index=index, **begun, function=function)
