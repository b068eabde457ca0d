"""Which tools an answer may call, which it must, and the grammar that makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidParameter
from ...request import GrammarKind, GrammarSpec
from ..answer.call_parser import CallForm
from .schemas import NamedChoice, Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools shown to the model and those it may call; ``forced``: it says nothing else."""

    tools: tuple[Tool, ...]
    names: frozenset[str]
    forced: bool
    single: bool  # at most one call

    @property
    def grammar(self) -> GrammarSpec | None:
        """What a forced answer must be."""
        if not self.forced:
            return None
        schema = json.dumps(self._list_schema(), ensure_ascii=False)
        return GrammarSpec(GrammarKind.JSON, schema, "tools")

    def grammar_beside(self, answer: GrammarSpec, form: CallForm) -> GrammarSpec:
        """What a free answer must be: ``answer``, or calls in the model's own form.

        Raises ``InvalidParameter`` for an answer that no JSON schema describes.
        """
        schema = _object(answer.text) if answer.kind is GrammarKind.JSON else None
        if schema is None:
            raise InvalidParameter(
                f"{answer.param} is no JSON schema, so that calls can't stand beside it; set "
                'tool_choice to "none"',
                param="tool_choice",
            )
        call = _json_rule({"anyOf": self._calls(), "$defs": self._definitions()})
        marked = [json.dumps(f"{form.opening}\n"), call, json.dumps(f"\n{form.closing}")]
        lark = [
            "start: answer | calls",
            f"answer: {_json_rule(schema)}",
            "calls: call" if self.single else f"calls: call ({json.dumps(form.between)} call)*",
            f"call: {call if form.bare else ' '.join(marked)}",
        ]
        return GrammarSpec(GrammarKind.GRAMMAR, "\n".join(lark), answer.param)

    def _list_schema(self) -> dict[str, Any]:
        """A list of calls."""
        at_most = {"maxItems": 1} if self.single else {}
        calls = {"anyOf": self._calls()}
        return {
            "type": "array",
            "minItems": 1,
            **at_most,
            "items": calls,
            "$defs": self._definitions(),
        }

    def _calls(self) -> list[dict[str, Any]]:
        return [_call_schema(tool.function.name) for tool in self._callable()]

    def _definitions(self) -> dict[str, Any]:
        """Each tool's own schema, whole, so that it can refer to its own parts."""
        functions = [tool.function for tool in self._callable()]
        return {f.name: _moved(f.parameters or {}, f.name) for f in functions}

    def _callable(self) -> list[Tool]:
        return [tool for tool in self.tools if tool.function.name in self.names]


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, *, parallel: bool
) -> ToolUse | None:
    """What a request says of tools; None where no tool is to be called.

    Raises ``InvalidParameter`` for a choice that the tools don't offer.
    """
    names = [tool.function.name for tool in tools or ()]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InvalidParameter(f"tools has {sorted(twice)[0]!r} twice", param="tools")
    if isinstance(choice, NamedChoice):
        wanted = choice.function.name
        if wanted not in names:
            raise InvalidParameter(
                f"tool_choice names {wanted!r}, which is not among the tools", param="tool_choice"
            )
        return ToolUse(tuple(tools or ()), frozenset((wanted,)), forced=True, single=True)
    if choice == "required" and not names:
        raise InvalidParameter("tool_choice required needs tools", param="tool_choice")
    if not names or choice == "none":
        return None
    return ToolUse(tuple(tools or ()), frozenset(names), choice == "required", not parallel)


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": name},
            "arguments": {"type": "object", "$ref": f"#/$defs/{name}"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, name: str) -> Any:
    """A schema with its references to itself as they are under ``#/$defs/name``."""
    if isinstance(schema, list):
        return [_moved(item, name) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, name) for key, value in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{target[1:]}"
    return moved


def _object(text: str) -> dict[str, Any] | None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) else None


def _json_rule(schema: dict[str, Any]) -> str:
    """Lark for JSON of this schema. Models that have lost their way write space for ever."""
    bounded = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}, **schema}
    return f"%json {json.dumps(bounded, ensure_ascii=False)}"
