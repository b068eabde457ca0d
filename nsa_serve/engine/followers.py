"""Where each request stands in its grammar; compiled and followed on threads of their own.

Masks are made beside the forward pass: the engine's loop hands over a token, and takes the mask
when it is there. A grammar that is slow holds up its own request alone.
"""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from llguidance import LLMatcher

from ..errors import InvalidParameter
from ..request import GrammarSpec
from .grammar import CompiledGrammar, GrammarCompiler, GrammarFailed, one_line

logger = logging.getLogger(__name__)

FAILED = "the grammar of this request could not be followed; see the server's log"
COMPILE_SECONDS = 10.0  # from a request's arrival until its grammar is compiled
MASK_SECONDS = 5.0
# Ordinary masks take a tenth of a millisecond; it is cheaper to wait for them than to run a step
# without their requests.
GRACE_SECONDS = 0.005
REST_SECONDS = 0.02  # where nothing can run before a mask has come; commands wait as long
_NUM_COMPILING = 2
_NUM_MASKING = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """What a grammar said after a request's last token: a mask, an error, or that it is done."""

    request_id: str
    mask: bytes | None = None
    error: str | None = None
    param: str | None = None  # the request's field that is at fault; None: our side is


@dataclass(slots=True)
class _Follower:
    spec: GrammarSpec
    work: Future[CompiledGrammar | None]
    deadline: float
    matcher: LLMatcher | None = None


class Followers:
    """All requests with a grammar. Called by the engine's thread; times are the engine's clock's.

    After ``open`` and after each ``advance`` a request gets exactly one turn, unless it is closed.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._compiling = ThreadPoolExecutor(_NUM_COMPILING, "grammar-compile")
        self._masking = ThreadPoolExecutor(_NUM_MASKING, "grammar-mask")
        self._followers: dict[str, _Follower] = {}
        self._pending: dict[str, _Follower] = {}
        self._fresh: list[Future[CompiledGrammar | None]] = []  # submitted since the last turns

    def __len__(self) -> int:
        return len(self._followers)

    def open(self, request_id: str, spec: GrammarSpec, now: float) -> None:
        """Begin to compile a request's grammar."""
        work = self._compiling.submit(_begin, self._compiler, spec)
        follower = _Follower(spec, work, now + COMPILE_SECONDS)
        self._followers[request_id] = follower
        self._await(request_id, follower)

    def advance(self, request_id: str, token_id: int, now: float) -> None:
        """Take a sampled token, and begin to make the mask behind it."""
        follower = self._followers[request_id]
        assert follower.matcher is not None, f"{request_id}: a token before the first mask"
        follower.work = self._masking.submit(_advance, self._compiler, follower.matcher, token_id)
        follower.deadline = now + MASK_SECONDS
        self._await(request_id, follower)

    def close(self, request_id: str) -> None:
        """Forget a request, if it is here. What a thread still does for it is dropped."""
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            follower.work.cancel()
            self._pending.pop(request_id, None)

    def turns(self, now: float) -> list[Turn]:
        """What has come, after a moment's wait for what was begun since the last call."""
        if self._fresh:
            wait(self._fresh, timeout=GRACE_SECONDS)
            self._fresh.clear()
        due = [
            (request_id, follower)
            for request_id, follower in self._pending.items()
            if follower.work.done() or follower.deadline <= now
        ]
        return [self._turn(request_id, follower) for request_id, follower in due]

    def rest(self) -> None:
        """Wait a moment for the next turn: nothing else can be done."""
        work = [follower.work for follower in self._pending.values()]
        wait(work, timeout=REST_SECONDS, return_when=FIRST_COMPLETED)

    def _await(self, request_id: str, follower: _Follower) -> None:
        self._pending[request_id] = follower
        self._fresh.append(follower.work)

    def _turn(self, request_id: str, follower: _Follower) -> Turn:
        del self._pending[request_id]
        param, work = follower.spec.param, follower.work
        if not work.done():
            return Turn(request_id, error=_overdue(follower), param=param)
        failure = work.exception()
        if isinstance(failure, InvalidParameter | GrammarFailed):
            return Turn(request_id, error=str(failure), param=param)
        if failure is not None:
            logger.error("the grammar of %s failed", request_id, exc_info=failure)
            return Turn(request_id, error=FAILED)
        step = work.result()
        if step is None:
            return Turn(request_id)
        follower.matcher = step.matcher
        return Turn(request_id, mask=step.mask)


def _begin(compiler: GrammarCompiler, spec: GrammarSpec) -> CompiledGrammar | None:
    """The matcher before the first token, and the mask for it; None if the text must be empty."""
    grammar = compiler.compile(spec)
    return None if grammar.matcher.is_stopped() else grammar


def _advance(
    compiler: GrammarCompiler, matcher: LLMatcher, token_id: int
) -> CompiledGrammar | None:
    """The matcher behind a token, and the mask for the next; None if there can be none."""
    if not matcher.consume_token(token_id):
        raise GrammarFailed(f"the grammar can't be followed: {one_line(matcher.get_error())}")
    if matcher.is_stopped():
        return None
    return CompiledGrammar(matcher, compiler.mask_of(matcher))


def _overdue(follower: _Follower) -> str:
    param = follower.spec.param
    if follower.matcher is None:
        return f"{param} is too complex: it was not compiled within {COMPILE_SECONDS:g} s"
    return f"{param} is too complex: what it allows was not known within {MASK_SECONDS:g} s"
