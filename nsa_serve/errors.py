"""The one tree of errors: the client's fault, the server's fault, and what to do about each."""

from __future__ import annotations


class NSAServeError(Exception):
    """Root of every error this project raises on purpose."""


class RequestError(NSAServeError):
    """The client's fault: the request can't be served as it is. ``param`` names the field."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameter(RequestError):
    """A field has a wrong type or value."""


class UnreadableBody(InvalidParameter):
    """The body did not come whole, or is no JSON."""


class PromptTooLong(RequestError):
    """Prompt, or prompt and max_tokens together, exceed the context."""

    code = "context_length_exceeded"


class TemplateError(RequestError):
    """The chat template refused the messages."""


class ModelNotFound(RequestError):
    """The request names a model that isn't served here."""

    code = "model_not_found"


class TraceNotFound(RequestError):
    """No record is kept of what NSA looked at for that request."""

    code = "trace_not_found"


class InvalidAPIKey(RequestError):
    """No key, or a wrong one."""

    code = "invalid_api_key"


class BodyTooLarge(RequestError):
    """The body exceeds the limit on bytes."""


class ServerError(NSAServeError):
    """Our side can't serve the request now, or failed at it."""


class Overloaded(ServerError):
    """The queue is full, or the server drains. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDead(ServerError):
    """The engine process ended; nothing can be served until a restart."""


class StepFailed(ServerError):
    """A step failed on this request (its logits were NaN, say); the engine goes on."""


class RequestTimeout(ServerError):
    """The request took longer than its time-out, and was ended."""


class ConfigError(NSAServeError):
    """A flag or a combination of flags can't work; the message names the flag and the numbers."""


class CheckpointError(NSAServeError):
    """A checkpoint is missing, truncated or unsupported; the message names the file and the key."""


class EvaluationStopped(NSAServeError):
    """An evaluation can't go on; the results so far are in its record, and a new run resumes it."""


class TrainingFailed(NSAServeError):
    """A run whose numbers can't be right: a loss or gradient that is absent or not finite."""


class BatchStopped(NSAServeError):
    """A batch can't go on; the answers so far are in its output, and a new run resumes it."""
