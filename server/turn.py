"""The next turn of a conversation: what chat completions and responses ask for alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ..errors import InvalidParameter
from ..request import EngineRequest, FinishReason, SamplingParams
from .answer.call_parser import CALL_LIST, CallParser
from .answer.parser import AnswerParser
from .answer.reasoning import reasoning_splitter
from .messages import Message
from .replies import FinishName
from .schemas import GenerationRequest
from .services import FINISH_NAMES, Head, Services
from .tools.use import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is to be said next, and how it is asked for."""

    messages: Sequence[Message]
    param: str  # the field of the body that the messages came in
    tools: ToolUse | None
    max_tokens: int | None  # None: as many as the context holds
    logprobs: int | None
    add_generation_prompt: bool = True
    template_arguments: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """The engine's requests, one a choice, and what reads each answer."""

    requests: list[EngineRequest]
    parsers: list[AnswerParser]
    num_prompt: int  # tokens


def prepare_turn(
    services: Services, asked: GenerationRequest, turn: Turn, head: Head
) -> PreparedTurn:
    """Check, template and encode: everything before the engine. Runs on a worker thread."""
    prompts = services.prompts
    text = prompts.render(
        turn.messages,
        turn.tools.tools if turn.tools else (),
        add_generation_prompt=turn.add_generation_prompt,
        arguments=turn.template_arguments,
    )
    token_ids = prompts.encode(text, add_special=False, param=turn.param)
    prompts.check_queue([len(token_ids)], asked.num_choices)
    max_tokens = prompts.fit(len(token_ids), turn.max_tokens, turn.param)
    requests = [
        EngineRequest(
            request_id=f"{head.id}-{choice}",
            prompt_token_ids=token_ids,
            sampling=_sampling(services, asked, turn, max_tokens, choice),
            priority=asked.priority or 0,
            deadline=asked.deadline,
            timeout=asked.timeout,
            cache_salt=asked.cache_salt or "",
            stream=bool(asked.stream),
        )
        for choice in range(asked.num_choices)
    ]
    parsers = [_parser(services, turn.tools, text, request.sampling) for request in requests]
    return PreparedTurn(requests, parsers, len(token_ids))


def finish_name(reason: FinishReason, parser: AnswerParser) -> FinishName:
    """Why an answer ended, in OpenAI's words."""
    if reason is FinishReason.STOP and parser.num_calls:
        return "tool_calls"
    return FINISH_NAMES[reason]


def _sampling(
    services: Services, asked: GenerationRequest, turn: Turn, max_tokens: int, choice: int
) -> SamplingParams:
    sampling = services.prompts.sampling(
        asked,
        max_tokens=max_tokens,
        logprobs=turn.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        choice=choice,
    )
    if turn.tools is None:
        return sampling
    if turn.tools.grammar is not None:
        if sampling.grammar is not None:
            raise InvalidParameter(
                "the answer can't be calls, as tool_choice asks, and of a given form too",
                param="tool_choice",
            )
        return replace(sampling, grammar=turn.tools.grammar)
    grammar = sampling.grammar
    if grammar is not None:
        grammar = turn.tools.grammar_beside(grammar, services.prompts.tools.free_form())
    # Some vocabularies have the marks of calls among their special tokens.
    skips = bool(asked.skip_special_tokens)
    return replace(sampling, skip_special_tokens=skips, grammar=grammar)


def _parser(
    services: Services, tools: ToolUse | None, prompt: str, sampling: SamplingParams
) -> AnswerParser:
    # A grammar holds from the first token, so that there is no reasoning.
    if tools is not None and tools.forced:
        return AnswerParser(None, CallParser(CALL_LIST, tools.names), single=tools.single)
    kind = None if sampling.grammar is not None else services.settings.reasoning_parser
    splitter = None if kind is None else reasoning_splitter(kind, prompt)
    if tools is None:
        return AnswerParser(splitter, None)
    calls = CallParser(services.prompts.tools.free_form(), tools.names)
    return AnswerParser(splitter, calls, single=tools.single)
