"""What clients send: OpenAI's request bodies, as strict as OpenAI is, with vLLM's additions.

Fields that would change the answer and aren't built are refused by name; names nobody knows are
ignored, as clients expect, and told of in the log. What needs the model or its tokenizer is
checked in prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from ..errors import InvalidParameter
from ..request import MAX_LOGPROBS
from .body import Body, Strict
from .messages import Messages
from .settings import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from .structured import StructuredFields
from .tools.schemas import ToolChoice, Tools

_INT64 = 1 << 63
_MAX_TOKEN_ID = 1 << 31
_MAX_WAIT_MS = 7 * 24 * 3_600_000

# Values with which an unsupported field asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "continue_final_message": (False,),
}
_UNSUPPORTED = frozenset(_NEUTRAL) | {
    "allowed_token_ids",
    "audio",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    "suffix",
    "chat_template",
    "documents",
    "guided_whitespace_pattern",
    "structural_tag",
    "logits_processors",
    "prompt_embeds",
    "truncate_prompt_tokens",
}
# What OpenAI's clients may send that is for OpenAI's own service alone.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

TokenId = Annotated[int, Field(ge=0, lt=_MAX_TOKEN_ID)]
TokenIds = list[int]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)]
Stop = Annotated[Stops, BeforeValidator(_as_list, json_schema_input_type=StopText | Stops)]


class GenerationRequest(StructuredFields):
    """The fields that chat and text completions share."""

    known_names: ClassVar[frozenset[str]] = _UNSUPPORTED | _WITHOUT_EFFECT

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Stop | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = (
        None
    )
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    # From arrival. A deadline orders requests (--scheduling-policy deadline), a time-out ends one.
    deadline_ms: Annotated[int, Field(ge=1, le=_MAX_WAIT_MS)] | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=_MAX_WAIT_MS)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    nsa_trace: bool | None = None  # keep what NSA looked at, for GET /traces/{id}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def deadline(self) -> float | None:
        """Seconds from arrival."""
        return None if self.deadline_ms is None else self.deadline_ms / 1000

    @property
    def timeout(self) -> float | None:
        """Seconds from arrival."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options needs stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidParameter(
                "prompt_logprobs can't be streamed; leave stream out", param="prompt_logprobs"
            )
        if len(self.logit_bias or {}) > MAX_LOGIT_BIAS:
            raise InvalidParameter(
                f"logit_bias has {len(self.logit_bias or {})} entries; at most {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        return self

    def _refuse_unsupported(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and not self._asks_nothing(name, value):
                raise InvalidParameter(f"{name} is not supported here", param=name)

    def _asks_nothing(self, name: str, value: object) -> bool:
        if name == "best_of":
            return value is None or value == self.num_choices
        return value is None or value in _NEUTRAL.get(name, ())


TemplateArguments = dict[str, Any]


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens wanted; None: as many as the context holds."""
        return self.max_completion_tokens or self.max_tokens


_PROMPT_FORMS = (
    "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
)


def _is_token_ids(value: Sequence[object]) -> bool:
    # bool is a kind of int in Python, but no token id.
    return all(type(item) is int and 0 <= item < _MAX_TOKEN_ID for item in value)


def _as_prompts(value: Any) -> list[str | TokenIds]:
    """Every form of ``prompt`` as a list of texts or of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(_PROMPT_FORMS)
    if type(value[0]) is int:
        value = [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; at most {MAX_PROMPTS}")
    texts = all(isinstance(item, str) for item in value)
    ids = all(isinstance(item, list) and item and _is_token_ids(item) for item in value)
    if not (texts or ids):
        raise ValueError(_PROMPT_FORMS)
    prompts: list[str | TokenIds] = value
    return prompts


Prompts = Annotated[
    Any,
    BeforeValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": {"type": "integer"}},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}},
                },
            ]
        }
    ),
]


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | TokenIds]:
        prompts: list[str | TokenIds] = self.prompt
        return prompts

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        choices = len(self.prompts) * self.num_choices
        if choices > MAX_CHOICES:
            raise InvalidParameter(
                f"{len(self.prompts)} prompts times n {self.num_choices} are {choices} choices; "
                f"at most {MAX_CHOICES}",
                param="n",
            )
        return self


class TokenizeRequest(Body):
    """Body of ``POST /tokenize``: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameter("send either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
