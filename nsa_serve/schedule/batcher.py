"""Fills a step: decodes, short prompts, newcomers, long prompts; and says who makes room."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.manager import CacheManager, Match
from ..request import Request, RequestStatus
from .draft import Draft
from .forecast import Forecast
from .roster import Roster


class Batcher:
    """Hands out one step's budget, and blocks with it. ``draft.py`` says how it is shared.

    Blocks that are lacking are taken from requests that stand behind in the order and are not
    in the step. So the first always gets its blocks in the end, and alone it fits: it was accepted.
    """

    def __init__(
        self, roster: Roster, cache: CacheManager, token_budget: int, *, interactive: bool
    ) -> None:
        self._roster = roster
        self._cache = cache
        self._token_budget = token_budget
        self._interactive = interactive
        self._lengths = roster.lengths
        # First in the queue that didn't fit, and when that was: blocks to be had, requests gone.
        self._blocked: tuple[int, int, int] | None = None

    def fill(self, step_id: int, now: float) -> Draft:
        """A step, perhaps without a chunk: then nothing can run now."""
        draft = Draft(step_id, self._token_budget, self._interactive)
        prefills = self._place_decodes(draft, now)
        longs = [request for request in prefills if draft.is_long(request)]
        if longs:
            draft.keep_for_long(is_first=longs[0] is prefills[0])
        for request in prefills:
            if not draft.is_long(request):
                self._place_some(draft, request, draft.spare, now)
        if not draft.starved:
            self._admit(draft, prefills, longs, now)
        self._place_long(draft, longs, now)
        return draft

    def _place_decodes(self, draft: Draft, now: float) -> list[Request]:
        """One token for each request that lacks one. Returns those that lack more, in order."""
        prefills = []
        for request in tuple(self._roster.running):
            if request.status is not RequestStatus.RUNNING:  # preempted a moment ago
                continue
            num_tokens = request.num_tokens
            if num_tokens - request.num_computed > 1:
                prefills.append(request)
            elif num_tokens < request.limit and draft.left and not request.awaits_mask:
                self._place(draft, request, 1, now)
        return prefills

    def _place_long(self, draft: Draft, longs: Sequence[Request], now: float) -> None:
        if not longs:
            return
        # Somebody who runs and isn't in the step waits for a mask, or for a token in flight.
        share = draft.share_among_long(alone=len(longs) == len(self._roster.running))
        spent = draft.left - share
        shortest = min(longs, key=_num_lacking)
        in_order = sorted((r for r in longs if r is not shortest), key=self._roster.order)
        self._place_some(draft, shortest, share // 2 if in_order else share, now)
        for request in in_order:
            self._place_some(draft, request, draft.left - spent, now)

    def _place_some(self, draft: Draft, request: Request, most: int, now: float) -> None:
        # The last token is left for a step that may sample behind it.
        num_tokens = min(most, _num_lacking(request) - request.awaits_mask)
        if num_tokens > 0 and request.status is RequestStatus.RUNNING:
            self._place(draft, request, num_tokens, now)

    def _place(self, draft: Draft, request: Request, num_tokens: int, now: float) -> None:
        """Put a request's next tokens into the step, if blocks for them can be had."""
        new_block_ids = self._extend(draft, request, request.num_computed + num_tokens)
        if new_block_ids is None:
            draft.starved = True
            return
        if request.row is None:
            held = self._cache.block_ids(request)
            hits = held[: len(held) - len(new_block_ids)]
            draft.start_row(request, self._roster.take_row(request, now), hits)
        draft.place(request, num_tokens, new_block_ids)

    def _extend(self, draft: Draft, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for the first ``num_tokens`` tokens, from others if need be.

        None: not now. Blocks on their way back are waited for before more are taken away.
        """
        while (new_block_ids := self._cache.extend(request, num_tokens)) is None:
            victim = None if self._roster.retiring else self._victim(draft, request)
            if victim is None:
                return None
            self._roster.preempt(victim, self._num_lost(victim))
            draft.starved = True
        return new_block_ids

    def _victim(self, draft: Draft, request: Request) -> Request | None:
        """Of those behind the request that aren't in the step, the one with least work to lose."""
        behind = self._roster.behind(request)
        found = [r for r in behind if r.last_step != draft.step_id and self._cache.num_held(r)]
        return min(reversed(found), key=self._num_lost, default=None)

    def _num_lost(self, request: Request) -> int:
        """Tokens to compute again. Pages that others hold too stay; its own will be overwritten."""
        kept = self._cache.num_shared(request) * self._cache.page_size
        return max(0, request.num_computed - kept)

    def _admit(
        self, draft: Draft, prefills: Sequence[Request], longs: list[Request], now: float
    ) -> None:
        """Let requests run, in the order, while there is room for them as they will grow."""
        if self._roster.queue.peek() is None:
            return
        promised = sum(self._num_outstanding(request) for request in prefills)
        forecast: Forecast | None = None
        while (
            (request := self._roster.queue.peek()) is not None
            and not self._roster.is_full
            and draft.spare > 0
            and not self._is_blocked(request)
        ):
            match = self._cache.match(request)
            if self._park(request, match):
                continue
            forecast = self._forecast() if forecast is None else forecast
            num_new = self._cache.num_pages(request.num_tokens) - len(match.block_ids)
            num_pages = num_new + match.num_idle
            if not self._fits(request, num_pages, promised, forecast):
                self._blocked = request.index, self._cache.num_usable, self._roster.num_left
                return
            self._roster.start(match)
            if draft.is_long(request):
                if not longs:
                    draft.keep_for_long(is_first=not prefills)
                longs.append(request)
            else:
                self._place_some(draft, request, draft.spare, now)
            promised += self._num_outstanding(request)
            forecast.add(self._lengths.remaining(request), num_pages)

    def _fits(self, request: Request, num_pages: int, promised: int, forecast: Forecast) -> bool:
        """Whether its tokens have room now, and all that run will have it as they grow."""
        if num_pages > self._cache.num_usable - promised:
            return False
        num_running = len(self._roster.running)
        if num_running == 0:
            return True
        if not self._cache.holds_near(num_running + 1, self._token_budget):
            return False
        peak = forecast.peak_with(self._lengths.remaining(request), num_pages)
        return peak <= self._cache.num_blocks

    def _forecast(self) -> Forecast:
        """Of the requests that run. A page that several hold counts for each in part."""
        forecast = Forecast(self._cache.page_size)
        running = self._roster.running
        held = sum(map(self._cache.num_held, running))
        part = min(1.0, self._cache.num_in_use / held) if held else 1.0
        for request in running:
            num_pages = part * self._cache.num_held(request) + self._num_outstanding(request)
            forecast.add(self._lengths.remaining(request), num_pages)
        return forecast

    def _num_outstanding(self, request: Request) -> int:
        return max(0, self._cache.num_pages(request.num_tokens) - self._cache.num_held(request))

    def _is_blocked(self, request: Request) -> bool:
        """Whether the first in the queue was tried in vain, and no room has come since.

        Spares walking a long prompt's pages each step.
        """
        if not self._roster.running or self._blocked is None:
            return False
        index, num_usable, num_left = self._blocked
        same = index == request.index and num_left == self._roster.num_left
        return same and self._cache.num_usable <= num_usable

    def _park(self, request: Request, match: Match) -> bool:
        """Let a request wait while one before it computes a page that both need."""
        awaited = self._cache.awaited(request, match)
        if awaited is None:
            return False
        digest, leader = awaited
        if self._roster.order(leader) > self._roster.order(request):
            return False
        self._roster.queue.park(digest)
        return True


def _num_lacking(request: Request) -> int:
    return request.num_tokens - request.num_computed
