"""From a checked request to what the engine takes: token ids that fit, and sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import InvalidParameter, ModelNotFound, Overloaded, PromptTooLong
from ..request import SamplingParams
from .admission import RETRY_QUEUE
from .errors import echo
from .messages import Message, turns_of
from .ports import Tokenizer
from .schemas import GenerationRequest
from .settings import SamplingDefaults, ServerSettings
from .tools.prompt import ToolPrompting
from .tools.schemas import Tool

T = TypeVar("T")

# What a template's variables must not replace: our own arguments, and a template as a whole.
_TEMPLATE_NAMES = frozenset(
    ("self", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")
)
_SEED_MASK = (1 << 63) - 1


class Workers:
    """Threads for parsing, templating and tokenising, which would hold up every stream otherwise.

    At most ``max_waiting`` calls are under way or waiting; more are refused.
    """

    def __init__(self, threads: int, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._max_waiting = max_waiting
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        if self._waiting >= self._max_waiting:
            raise Overloaded(
                f"{self._waiting} requests wait to be tokenized already", retry_after=RETRY_QUEUE
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class PromptEncoder:
    """Turns what clients send into token ids that fit the context of the model served."""

    def __init__(self, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self.tools = ToolPrompting.of(settings.tool_call_parser, tokenizer.tool_template)

    def check_model(self, name: str | None) -> None:
        """Raise ``ModelNotFound`` unless the name, if there is one, is one we serve."""
        if name is not None and name not in self._settings.model_names:
            served = ", ".join(self._settings.model_names)
            raise ModelNotFound(
                f"The model {echo(name)} does not exist; this server has {served}", param="model"
            )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = True,
        arguments: dict[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. The template writes its own special tokens."""
        shown, offered = self.tools.prompt(turns_of(messages), tools)
        return self._tokenizer.apply_chat_template(
            shown,
            add_generation_prompt=add_generation_prompt,
            tools=offered,
            **self._checked(arguments or {}),
        )

    def _checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TEMPLATE_NAMES & arguments.keys())
        if taken:
            raise InvalidParameter(
                f"chat_template_kwargs must not set {', '.join(taken)}",
                param="chat_template_kwargs",
            )
        return arguments

    def encode(self, text: str, *, add_special: bool, param: str) -> list[int]:
        """Token ids of a text; ``InvalidParameter`` if there are none."""
        token_ids = self._tokenizer.encode(text, add_special=add_special)
        if not token_ids:
            raise InvalidParameter(f"{param} is empty", param=param)
        return token_ids

    def completion(self, prompt: str | list[int], *, add_special: bool) -> list[int]:
        """Token ids of one prompt of a completion."""
        if isinstance(prompt, str):
            return self.encode(prompt, add_special=add_special, param="prompt")
        self.check_ids(prompt, "prompt")
        return prompt

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        worst = max(token_ids, default=0)
        if worst >= self._settings.vocab_size:
            raise InvalidParameter(
                f"{param} has token id {worst}; the vocabulary has {self._settings.vocab_size}",
                param=param,
            )

    def fit(self, num_prompt: int, max_tokens: int | None, param: str) -> int:
        """The most tokens to generate, or ``PromptTooLong`` in OpenAI's words."""
        length = self._settings.max_model_len
        wanted = max_tokens or 1
        if num_prompt + wanted > length:
            raise PromptTooLong(
                f"This model's maximum context length is {length} tokens. However, you requested "
                f"{num_prompt + wanted} tokens ({num_prompt} in the {param}, {wanted} in the "
                f"completion). Please reduce the length of the {param} or completion.",
                param=param,
            )
        return max_tokens or length - num_prompt

    def check_queue(self, prompt_lengths: Sequence[int], num_choices: int) -> None:
        """Raise ``InvalidParameter`` for more than the queue could ever hold, ``num_choices`` each.

        The engine would call itself overloaded, and clients would try again for nothing.
        """
        total = len(prompt_lengths) * num_choices
        tokens = sum(prompt_lengths) * num_choices
        limits = self._settings
        if total > limits.max_queued_requests:
            raise InvalidParameter(
                f"{total} choices were asked for; the queue holds {limits.max_queued_requests}",
                param="n",
            )
        if total > 1 and tokens > limits.max_queued_tokens:
            raise InvalidParameter(
                f"the choices have {tokens} prompt tokens; the queue holds "
                f"{limits.max_queued_tokens}",
                param="n",
            )

    def sampling(
        self,
        request: GenerationRequest,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        choice: int,
    ) -> SamplingParams:
        """Sampling of one of the request's choices: its seed is the request's plus its number."""
        given = self._settings.defaults
        if request.stop_token_ids:
            self.check_ids(request.stop_token_ids, "stop_token_ids")
        seed = None if request.seed is None else (request.seed + choice) & _SEED_MASK
        return SamplingParams(
            **_with_defaults(request, given),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=seed,
            stop=tuple(request.stop or ()),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            include_stop=bool(request.include_stop_str_in_output),
            max_tokens=max_tokens,
            min_tokens=self._min_tokens(request, max_tokens),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=self._logit_bias(request.logit_bias or {}),
            bad_words=self._bad_words(request.bad_words or ()),
            skip_special_tokens=request.skip_special_tokens is not False,
            grammar=request.grammar(),
            trace=self._wants_trace(request),
        )

    def _wants_trace(self, request: GenerationRequest) -> bool:
        engine = self._settings.engine
        if request.nsa_trace and engine is not None and engine.attention != "nsa":
            raise InvalidParameter(
                f"nsa_trace needs a model served with NSA, and this one's attention is "
                f"{engine.attention}: start the server with --attention nsa",
                param="nsa_trace",
            )
        return bool(request.nsa_trace)

    def _min_tokens(self, request: GenerationRequest, max_tokens: int) -> int:
        if (request.min_tokens or 0) > max_tokens:
            raise InvalidParameter(
                f"min_tokens {request.min_tokens} is more than the {max_tokens} tokens allowed",
                param="min_tokens",
            )
        return request.min_tokens or 0

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens as it stands at the beginning of a text and after a space."""
        spelt = [form for word in words for form in (word, f" {word.lstrip()}")]
        encoded = (tuple(self._tokenizer.encode(form, add_special=False)) for form in spelt)
        return tuple(dict.fromkeys(filter(None, encoded)))

    def _logit_bias(self, bias: dict[str, float]) -> dict[int, float]:
        return {self._bias_id(key): value for key, value in bias.items()}

    def _bias_id(self, key: str) -> int:
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 12 else -1
        if not 0 <= token_id < self._settings.vocab_size:
            raise InvalidParameter(
                f"logit_bias has key {echo(key)}; keys are token ids below "
                f"{self._settings.vocab_size}",
                param="logit_bias",
            )
        return token_id


def _with_defaults(request: GenerationRequest, given: SamplingDefaults) -> dict[str, Any]:
    top_k = given.top_k if request.top_k is None else max(request.top_k, 0)
    values = {
        name: getattr(given if getattr(request, name) is None else request, name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    }
    return {**values, "top_k": top_k}
