"""What the server needs to know to check and answer requests: frozen, built once at start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..engine.messages import EngineDescription

# A prompt as JSON token ids takes at most about eight bytes a token, as text less than that.
_BYTES_PER_TOKEN = 16
_LEAST_BODY = 4 << 20

MAX_N = 128
MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_CHOICE_TEXTS = 1024
MAX_CHOICE_CHARS = 4096
MAX_BAD_WORDS = 128
MAX_TOOLS = 128


class ToolCallParser(StrEnum):
    """The form in which a model writes calls of tools."""

    AUTO = "auto"  # the one that its chat template asks for
    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"


class ReasoningParser(StrEnum):
    """Models by what they do without an opening mark, in text and prompt: think, or answer."""

    DEEPSEEK_R1 = "deepseek_r1"
    QWEN3 = "qwen3"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling of requests that don't say otherwise: the checkpoint's generation_config."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The model's facts and the server's limits. Times in seconds, sizes in bytes."""

    model_names: tuple[str, ...]  # the first one is written into answers
    max_model_len: int  # prompt and completion together, in tokens
    vocab_size: int
    engine: EngineDescription | None = None  # what runs, for the status page
    defaults: SamplingDefaults = SamplingDefaults()
    tool_call_parser: ToolCallParser = ToolCallParser.AUTO
    reasoning_parser: ReasoningParser | None = None  # None: reasoning stays in the content
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    metrics_prefix: str = "nsa_serve"
    max_queued_requests: int = 1024  # a request of more choices could never be taken
    max_queued_tokens: int = 16 << 20  # nor one of more prompt tokens in more than one choice
    max_open_requests: int = 1280  # engine requests: running and queued
    max_open_tokens: int = 16 << 20  # prompt tokens of those
    tokenizer_threads: int = 2
    keep_alive: float = 10.0  # silence on a stream before a comment line is sent
    health_timeout: float = 7.0  # for the engine's loop to turn once
    body_bytes: int | None = None  # None: from the context

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def max_body_bytes(self) -> int:
        return self.body_bytes or max(_LEAST_BODY, _BYTES_PER_TOKEN * self.max_model_len)
