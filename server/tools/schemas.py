"""Tools and the choice among them, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..body import Strict
from ..settings import MAX_TOOLS

# As OpenAI has it, with the dot that model context servers put into names.
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Strict):
    """A function: ``parameters`` is a JSON schema of its arguments, none for no arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        given = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        # Templates add to the text of a description, and read the parameters' properties.
        parameters = {"type": "object", "properties": {}}
        function = {
            "name": self.function.name,
            "description": "",
            "parameters": parameters,
            **given,
        }
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    name: FunctionName


class NamedChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedChoice, Tag("function")],
    # So that an error tells of one of both.
    Discriminator(lambda value: "function" if isinstance(value, dict) else "mode"),
]
