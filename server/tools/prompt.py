"""How tools come into the prompt: by the model's own template, or in words where it has none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...errors import InvalidParameter
from ..answer.call_parser import HERMES, LLAMA3_JSON, CallForm
from ..settings import ToolCallParser
from .schemas import Tool

FORMS = {ToolCallParser.HERMES: HERMES, ToolCallParser.LLAMA3_JSON: LLAMA3_JSON}

Turn = dict[str, Any]

_INSTRUCTION = """You may call functions to answer. These are the functions, each a line of JSON:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between marks, like this:
<tool_call>
{{"name": "the_function", "arguments": {{"argument": "value"}}}}
</tool_call>
Results come back to you between <tool_response> and </tool_response>."""


@dataclass(frozen=True, slots=True)
class ToolPrompting:
    """A model's way with tools. Without a form its free calls can't be told from its text."""

    form: CallForm | None
    native: bool  # whether its template shows tools by itself

    @classmethod
    def of(cls, parser: ToolCallParser, template: str | None) -> ToolPrompting:
        """From ``--tool-call-parser`` and the template that takes tools, if one does."""
        form = FORMS.get(parser, _form_of(template))
        return cls(form, native=template is not None)

    def free_form(self) -> CallForm:
        """The form of calls that the model makes by itself."""
        if self.form is None:
            raise InvalidParameter(
                "this model's template shows no form of calls that is known here; choose "
                'tool_choice "required" or a function, or start the server with '
                f"--tool-call-parser {' or '.join(FORMS)}",
                param="tools",
            )
        return self.form

    def prompt(
        self, messages: Sequence[Turn], tools: Sequence[Tool]
    ) -> tuple[list[Turn], list[Turn] | None]:
        """(messages, tools) for the template."""
        shown = [tool.for_template() for tool in tools]
        if self.native:
            return list(messages), shown or None
        told = [_told(turn) for turn in messages]
        return _instructed(_with_results(told), shown), None


def _form_of(template: str | None) -> CallForm | None:
    """The form that a template asks its model for."""
    if template is None or HERMES.opening in template:
        return HERMES
    if LLAMA3_JSON.opening in template or '"parameters"' in template:
        return LLAMA3_JSON
    return None


def _instructed(turns: list[Turn], tools: Sequence[Turn]) -> list[Turn]:
    """The conversation with the tools described in its system message."""
    if not tools:
        return turns
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INSTRUCTION.format(tools=lines)
    if turns and turns[0]["role"] == "system":
        first = turns.pop(0)
        text = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *turns]


def _told(turn: Turn) -> Turn:
    """A turn with its calls as text."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())
    ]
    written = [f"{HERMES.opening}\n{call}\n{HERMES.closing}" for call in calls]
    content = "\n".join(filter(None, (turn["content"], *written)))
    return {**{key: turn[key] for key in turn if key != "tool_calls"}, "content": content}


def _with_results(turns: Sequence[Turn]) -> list[Turn]:
    """Results of calls as one turn of the user, a role that every template knows."""

    def grouped() -> Iterator[Turn]:
        for is_result, group in groupby(turns, key=lambda turn: turn["role"] == "tool"):
            if is_result:
                texts = (f"<tool_response>\n{t['content']}\n</tool_response>" for t in group)
                yield {"role": "user", "content": "\n".join(texts)}
            else:
                yield from group

    return list(grouped())
