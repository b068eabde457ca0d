"""What a request is: its sampling settings, the messages it travels in, its state here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

# As OpenAI bounds top_logprobs.
MAX_LOGPROBS = 20


class FinishReason(StrEnum):
    """Why a request ended. Only STOP, LENGTH and TOOL_CALLS reach an OpenAI client by name."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    TIMEOUT = "timeout"
    ABORT = "abort"
    ERROR = "error"


class GrammarKind(StrEnum):
    """The language in which a request says what its text must be."""

    JSON = "json"  # a JSON schema
    REGEX = "regex"  # a regular expression that the whole text matches
    CHOICE = "choice"  # a JSON list of strings, of which the text is one
    # Lark as llguidance reads it (``start: "<x>" %json {...} "</x>"``), or GBNF.
    GRAMMAR = "grammar"


class GrammarSpec(msgspec.Struct, frozen=True):
    """What a request's whole text must be. Travels as text; the engine's process compiles it."""

    kind: GrammarKind
    text: str
    param: str = "grammar"  # the request's field that it came in, for errors


# Any JSON object: OpenAI's ``json_object``.
JSON_OBJECT = GrammarSpec(GrammarKind.JSON, '{"type":"object"}')


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are sampled, and where it stops."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # whether a matched stop string stays in the text
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives beside each sampled token; None: nothing at all
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences not to be said, none empty
    skip_special_tokens: bool = True
    grammar: GrammarSpec | None = None  # what the text must be; None: anything
    trace: bool = False  # whether what NSA looked at is recorded


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it enters the engine: prompt encoded; n choices are n requests."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0  # lower runs first
    deadline: float | None = None  # seconds from arrival by which its answer is wanted
    timeout: float | None = None  # seconds from arrival after which it is ended
    cache_salt: str = ""  # separates tenants' prefix caches
    stream: bool = True  # False: one output at the end, no deltas


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one token and, best first, of its alternatives."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: list[tuple[int, float]]


class TokenTrace(msgspec.Struct, frozen=True):
    """What NSA read for one token: by the query that the token was sampled from."""

    position: int  # of the query
    shape: tuple[int, int, int]  # L, Hkv, n
    selection: bytes  # [L, Hkv, n] int32, pages of the request, ascending, −1 padded
    gates: bytes | None  # [L, Hkv, 3] fp32, means over a group's heads; None: fixed at (0, 1, 0)
    token_id: int = -1  # the token; set once it is known


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose K/V came from the prefix cache


class RequestTimes(msgspec.Struct, frozen=True):
    """Seconds on the engine's monotonic clock, for the metrics; None while it hasn't happened."""

    arrival: float
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came out since the last output; exactly one, the last, has ``finish_reason``."""

    request_id: str
    text: str = ""  # decoded text since the last output: whole characters, no part of a stop string
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    # Of the whole prompt, once; None for its first token.
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that matched
    error: str | None = None  # with FinishReason.ERROR and TIMEOUT
    error_param: str | None = None  # the request's field that is at fault, where one is
    trace: list[TokenTrace] | None = None  # only if asked for, with finish_reason
    usage: Usage | None = None  # always with finish_reason
    times: RequestTimes | None = None  # always with finish_reason


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True)
class Request:
    """A request's state in the engine. Written by ``Scheduler`` alone.

    No phase: the scheduler hands out budget until ``num_computed`` has caught up with
    ``num_tokens``. ``num_in_flight`` sampled tokens are known to the device but not yet here.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival: float  # seconds on the caller's clock, as all moments here
    priority: int = 0
    deadline: float | None = None  # seconds from arrival: the order among others
    timeout: float | None = None  # seconds from arrival: then it is ended
    cache_salt: str = ""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose K/V are in the cache, once the launched steps are done
    num_in_flight: int = 0
    num_cached: int = 0  # prompt tokens that came from the prefix cache at first admission
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    row: int | None = None  # row in the runner's tables while it runs
    first_scheduled: float | None = None
    index: int = 0  # order of acceptance: unique in an engine, breaks ties
    limit: int = 0  # total tokens at which it ends by length
    last_step: int = -1  # last launched step that reads or writes its blocks
    prompt_logprobs_to: int = 0  # first position whose log-probability was not given out yet
    mask: bytes | None = None  # a bit for each token that the grammar allows next
    mask_position: int = -1  # number of tokens that ``mask`` follows

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known to the device: prompt, outputs and those in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def awaits_mask(self) -> bool:
        """Whether no next token may be sampled yet: the grammar hasn't seen the last one."""
        return self.sampling.grammar is not None and self.mask_position != self.num_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt followed by outputs; those in flight are not here."""
        split = self.num_prompt
        prompt = self.prompt_token_ids[start:stop]
        output = self.output_token_ids[max(0, start - split) : max(0, stop - split)]
        return prompt + output
