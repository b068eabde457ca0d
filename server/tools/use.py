"""Which tools an answer may call, which it must, and the grammar that makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidParameter
from ...request import GrammarKind, GrammarSpec
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

    def _list_schema(self) -> dict[str, Any]:
        """A list of calls. Each tool's own schema is whole under $defs, so that it can refer to
        its own parts there."""
        callable_tools = [tool.function for tool in self.tools if tool.function.name in self.names]
        calls = [_call_schema(function.name) for function in callable_tools]
        at_most = {"maxItems": 1} if self.single else {}
        return {
            "type": "array",
            "minItems": 1,
            **at_most,
            "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
            "$defs": {
                function.name: _moved(function.parameters or {}, function.name)
                for function in callable_tools
            },
        }


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
