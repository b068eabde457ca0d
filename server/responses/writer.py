"""From what is said to a response's output items, and the typed events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from ..answer.events import CallArguments, CallBegun, Content, Event, Reasoning
from ..assistant import new_call_id

Fields = dict[str, Any]


class ItemWriter:
    """Builds items one after the other; ``items`` has those begun, the last one maybe open."""

    def __init__(self) -> None:
        self.items: list[Fields] = []
        self._is_open = False

    def write(self, event: Event) -> Iterator[Fields]:
        """The events that one event of the answer gives, without their sequence numbers."""
        match event:
            case Content(text):
                yield from self._text("message", text)
            case Reasoning(text):
                yield from self._text("reasoning", text)
            case CallBegun(_, name):
                yield from self.close()
                yield from self._open(_call(name))
            case CallArguments(_, text):
                self.items[-1]["arguments"] += text
                yield self._event("response.function_call_arguments.delta", delta=text)

    def close(self, status: str = "completed") -> Iterator[Fields]:
        """End the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments, name = item["arguments"], item["name"]
            kind = "response.function_call_arguments.done"
            yield self._event(kind, arguments=arguments, name=name)
        else:
            yield from self._text_done(item)
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.items) - 1,
            "item": item,
        }

    def finish(self, status: str) -> Iterator[Fields]:
        """End the last item; a response without any gets an empty message."""
        if not self.items:
            yield from self._text("message", "")
        yield from self.close(status)

    def _text(self, kind: str, text: str) -> Iterator[Fields]:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self.close()
            yield from self._open(_message() if kind == "message" else _reasoning())
            part = _output_text() if kind == "message" else _reasoning_text()
            self.items[-1]["content"].append(part)
            yield self._part_event("response.content_part.added", part=dict(part))
        if text:
            self.items[-1]["content"][0]["text"] += text
            yield self._text_event("delta", delta=text)

    def _text_done(self, item: Fields) -> Iterator[Fields]:
        part = item["content"][0]
        yield self._text_event("done", text=part["text"])
        yield self._part_event("response.content_part.done", part=part)

    def _text_event(self, stage: str, **fields: Any) -> Fields:
        if self.items[-1]["type"] == "message":
            return self._part_event(f"response.output_text.{stage}", **fields, logprobs=[])
        return self._part_event(f"response.reasoning_text.{stage}", **fields)

    def _open(self, item: Fields) -> Iterator[Fields]:
        self.items.append(item)
        self._is_open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": shown,
        }

    def _event(self, kind: str, **fields: Any) -> Fields:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **place, **fields}

    def _part_event(self, kind: str, **fields: Any) -> Fields:
        return self._event(kind, content_index=0, **fields)


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _message() -> Fields:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }


def _reasoning() -> Fields:
    return {
        "id": new_id("rs"),
        "type": "reasoning",
        "summary": [],
        "status": "in_progress",
        "content": [],
    }


def _call(name: str) -> Fields:
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "call_id": new_call_id(),
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }


def _output_text() -> Fields:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _reasoning_text() -> Fields:
    return {"type": "reasoning_text", "text": ""}
