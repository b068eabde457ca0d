"""Chat templates: a model's own Jinja text, rendered in a sandbox, bounded in size and time.

Templates come with checkpoints, so they are not ours; requests can't bring their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .. import errors
from .source import DEFAULT_TEMPLATE

# Far above any prompt that fits a context; a template that doubles its text meets it soon.
MAX_RENDERED_CHARS = 32 << 20
MAX_RENDER_SECONDS = 5.0
_TOOL_TEMPLATE = "tool_use"
_DEADLINE = "__deadline__"
_OWN_NAMES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", _DEADLINE)
)

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat templates by name, compiled. Safe to render from many threads at once."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises ``CheckpointError`` where a template is not valid Jinja."""
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in templates.items():
            try:
                self._templates[name] = environment.from_string(text)
            except TemplateError as error:
                raise errors.CheckpointError(f"chat template {name!r}: {error}") from error
        self.tool_template = _tool_template(environment, templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text for ``messages``; ``variables`` are passed on to the template.

        Raises ``TemplateError`` where there is no template, where it refuses the messages, or
        where it exceeds the bounds on size and time.
        """
        own = _OWN_NAMES & variables.keys()
        if own:
            raise errors.TemplateError(
                f"chat_template_kwargs can't set {sorted(own)}", param="chat_template_kwargs"
            )
        template = self._choose(bool(tools))
        values = {
            **self._special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
            _DEADLINE: time.monotonic() + MAX_RENDER_SECONDS,
        }
        return _guarded(lambda: _render(template, values))

    def _choose(self, has_tools: bool) -> jinja2.Template:
        if has_tools and _TOOL_TEMPLATE in self._templates:
            return self._templates[_TOOL_TEMPLATE]
        if DEFAULT_TEMPLATE not in self._templates:
            raise errors.TemplateError(
                "the model has no chat template; start the server with --chat-template FILE, "
                "or use /v1/completions",
                param="messages",
            )
        return self._templates[DEFAULT_TEMPLATE]


def _tool_template(environment: jinja2.Environment, templates: Mapping[str, str]) -> str | None:
    """The text of the template that shows tools; None where none does."""
    text = templates.get(_TOOL_TEMPLATE, templates.get(DEFAULT_TEMPLATE, ""))
    shows = "tools" in meta.find_undeclared_variables(environment.parse(text))
    return text if shows else None


def _guarded(render: Callable[[], str]) -> str:
    """Run it; whatever a template raises is the fault of the messages it was given."""
    try:
        return render()
    except errors.TemplateError:
        raise
    except RecursionError:
        raise errors.TemplateError("chat template: recursion too deep", param="messages") from None
    except Exception as error:
        raise errors.TemplateError(f"chat template: {error}", param="messages") from error


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    pieces = []
    num_chars = 0
    for piece in template.generate(values):
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise errors.TemplateError(
                f"chat template: the prompt exceeds {MAX_RENDERED_CHARS} characters",
                param="messages",
            )
        _check_time(values[_DEADLINE])
        pieces.append(piece)
    return "".join(pieces)


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise errors.TemplateError(
            f"chat template: rendering took more than {MAX_RENDER_SECONDS:g} s", param="messages"
        )


class _BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a look at the clock at every call and at the size of repeated text."""

    intercepted_binops = frozenset(("*", "**"))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The odd names are Jinja's: a template may pass keywords such as self.
        deadline = __context.resolve(_DEADLINE)
        if isinstance(deadline, float):
            _check_time(deadline)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _product_size(left, right) > MAX_RENDERED_CHARS:
            raise SecurityError("a product of this size is not allowed")
        if operator == "**" and abs(right) > 64:
            raise SecurityError("a power of this size is not allowed")
        return super().call_binop(context, operator, left, right)


def _product_size(left: Any, right: Any) -> int:
    """Elements of ``left * right`` where one of them is text or a list; 0 for numbers."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * count
    return 0


class _GenerationTag(Extension):
    """``{% generation %}`` marks text for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    environment = _BoundedSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes HTML, which would show in the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise errors.TemplateError(f"chat template: {message}", param="messages")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
