"""What the status page shows of requests that have ended: times to the first token, and traces."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import TraceNotFound
from ..request import EngineRequest, RequestOutput, TokenTrace

MAX_TIMES = 128
MAX_TRACES = 8


@dataclass(frozen=True, slots=True)
class KeptTrace:
    """One request's record of what NSA looked at, and the prompt that it is about."""

    prompt_token_ids: Sequence[int]
    tokens: Sequence[TokenTrace]

    @property
    def token_ids(self) -> list[int]:
        """The prompt and the tokens whose choice was recorded."""
        return [*self.prompt_token_ids, *(token.token_id for token in self.tokens)]


class Recent:
    """The last requests' times and the last traces; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)
        self._traces: OrderedDict[str, KeptTrace] = OrderedDict()

    def observe(self, request: EngineRequest, output: RequestOutput) -> None:
        """A request has ended with this output."""
        times = output.times
        if times is not None and times.first_token is not None:
            self._times.append((times.first_token, times.first_token - times.arrival))
        if output.trace:
            self._keep(request, output.trace)

    def first_tokens(self, now: float) -> Iterator[tuple[float, float]]:
        """(seconds ago, seconds from arrival) of first tokens; ``now`` is on the engine's clock."""
        return ((now - at, seconds) for at, seconds in self._times)

    def trace(self, request_id: str) -> KeptTrace:
        """The trace of a request that has ended. Raises ``TraceNotFound``."""
        kept = self._traces.get(request_id)
        if kept is None:
            raise TraceNotFound(
                "no trace is kept under this id: the request must have been sent with nsa_trace "
                f"and have ended, and only the last {MAX_TRACES} traces are kept",
                param="id",
            )
        return kept

    def _keep(self, request: EngineRequest, tokens: Sequence[TokenTrace]) -> None:
        # As machine words: a list of a long prompt's ids takes many times as much.
        prompt = array("i", request.prompt_token_ids)
        self._traces[request.request_id] = KeptTrace(prompt, tokens)
        while len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)
