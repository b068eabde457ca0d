"""What clients receive: OpenAI's objects, with vLLM's ``stop_reason`` and ``prompt_logprobs``.

Fields left out of an answer are those never set, so that a present ``null`` is on purpose. Whole
answers are pydantic's models, which describe them at /openapi.json; chunks, of which there is one
for each token, are msgspec's, which cost a tenth.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict

from ..request import Usage as EngineUsage

FinishName = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """Base of what is sent: built from our own values only, and never changed."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class Chunk(msgspec.Struct, frozen=True):
    """Base of what is sent in pieces. Parts of it that whole answers have too are replies."""

    def to_json(self) -> str:
        return _encoder.encode(self).decode()


def _reply_in_chunk(value: Any) -> msgspec.Raw:
    assert isinstance(value, Reply), f"{type(value)} can't be sent"
    return msgspec.Raw(value.to_json().encode())


_encoder = msgspec.json.Encoder(enc_hook=_reply_in_chunk)


class PromptTokensDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @classmethod
    def so_far(cls, prompt: int, completion: int) -> Usage:
        """Of a choice that still runs; what was cached is told at its end."""
        total = prompt + completion
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)

    @classmethod
    def total(cls, per_prompt: list[list[EngineUsage]]) -> Usage:
        """Sum over choices. A prompt's n choices count it, and what of it was cached, once."""
        prompt = sum(choices[0].prompt_tokens for choices in per_prompt)
        completion = sum(usage.completion_tokens for choices in per_prompt for usage in choices)
        cached = sum(choices[0].cached_tokens for choices in per_prompt)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class PromptLogprob(Reply):
    """One candidate for one prompt token, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Reply):
    """The older form, lists side by side. ``text_offset`` counts characters of the choice."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CalledFunction(Reply):
    name: str | None = None  # in the first piece of a streamed call
    arguments: str


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Reply):
    """Reasoning goes by two names: most servers' and clients', and vLLM's newer one."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName
    stop_reason: str | int | None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class DeltaCall(Reply):
    """A piece of a call; the first one has its id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Delta(msgspec.Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[DeltaCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishName | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(Chunk, frozen=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName | None
    stop_reason: str | int | UnsetType | None = UNSET


class CompletionChunk(Chunk, frozen=True):
    """A piece of a completion, whose ``object`` is the whole one's."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(Reply):
    """A response, by what is known of it. Its items are written by responses/writer.py."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    instructions: str | None
    metadata: dict[str, str]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    max_output_tokens: int | None
    usage: ResponseUsage | None = None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    previous_response_id: None = None
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"

    def to_json(self) -> str:
        return self.model_dump_json()


class ResponseEvent(Chunk, frozen=True):
    """One event of a streamed response; ``fields`` stand beside the others, and are its type's."""

    type: str
    sequence_number: int
    fields: dict[str, Any]

    def to_json(self) -> str:
        head = {"type": self.type, "sequence_number": self.sequence_number}
        return _encoder.encode(head | self.fields).decode()


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    prompt: str
