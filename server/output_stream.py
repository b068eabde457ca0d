"""One request's outputs between the client's reader and whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from .. import errors
from ..engine.messages import Rejection
from ..errors import InvalidParameter, NSAServeError, Overloaded
from ..request import RequestOutput

# Is offered each output that follows those its reader has; True where it has taken it.
Sink = Callable[[RequestOutput], bool]

# Outputs that may wait unmerged: a token's text is a few bytes, its output a few hundred.
NUM_UNMERGED = 64


class OutputStream:
    """Outputs of one request on their way to its reader; a slow reader gets them merged."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self._outputs: list[RequestOutput] = []
        self._merge_at = NUM_UNMERGED
        self._error: NSAServeError | None = None
        self._arrived = asyncio.Event()
        self.abandoned = False  # nobody reads any more; kept until the engine has ended it

    def push(self, output: RequestOutput) -> None:
        if self.abandoned:
            return
        if not self._outputs and self._sink is not None and self._sink(output):
            return
        self._outputs.append(output)
        self._arrived.set()
        if len(self._outputs) >= self._merge_at:
            self._compact()

    def fail(self, error: NSAServeError) -> None:
        self._error = error
        self._arrived.set()

    async def next(self) -> RequestOutput:
        """All that has come since the last call, as one output. Raises what ended the request."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._merge_at = NUM_UNMERGED
            if self._error is not None:
                self._arrived.set()
            return merge(outputs)
        assert self._error is not None
        raise self._error

    def _compact(self) -> None:
        """Merge what waits. The next time is put off the longer, the more there is to copy."""
        merged = merge(self._outputs)
        self._outputs = [merged]
        self._merge_at = NUM_UNMERGED + len(merged.token_ids) // 16


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """Outputs of one request that follow each other, as one."""
    if len(outputs) == 1:
        return outputs[0]
    logprobs = None
    if any(output.logprobs is not None for output in outputs):
        logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    prompt = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return msgspec.structs.replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=logprobs,
        prompt_logprobs=prompt[0] if prompt else None,
    )


def rebuild(rejection: Rejection) -> NSAServeError:
    """The error that the engine raised, as it was."""
    if rejection.retry_after is not None:
        return Overloaded(rejection.message, retry_after=rejection.retry_after)
    error = named_error(rejection.kind, rejection.message, fallback=InvalidParameter)
    if isinstance(error, errors.RequestError):
        error.param = rejection.param
    return error


def named_error(kind: str, message: str, *, fallback: type[NSAServeError]) -> NSAServeError:
    """The error of errors.py that ``kind`` names, or ``fallback`` where it names none."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NSAServeError) and found is not Overloaded:
        return found(message)
    return fallback(message)
