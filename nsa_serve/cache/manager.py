"""The cache's only door: who owns which blocks, what may be shared, and what is evicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from ..request import Request
from .blocks import BlockPool, BlockTable
from .near import NearPages, NearPins
from .prefix import PendingPages, PrefixIndex, page_digest, root_digest
from .residence import ABSENT, Residence, ResidenceUpdate
from .shelf import PageShelf, Shelving
from .tiers import TieredResidence, TierSizes


class Match(NamedTuple):
    """Leading full pages of a request that the cache holds already."""

    block_ids: list[int]
    num_idle: int  # of them held by nobody: taking them makes that many fewer usable


class CacheManager:
    """Blocks of all requests: match, allocate, extend, publish, free, evict.

    A request is ``add``-ed once and ``remove``-d once; in between it may hold blocks several
    times (it is preempted, it resumes). Requests are told apart by ``Request.index``.
    Only full pages whose K/V were computed in an applied step are published, under a digest of
    all tokens up to their end; a partial page has one holder.
    """

    def __init__(
        self,
        num_blocks: int,
        page_size: int,
        *,
        enable_prefix_caching: bool = True,
        tiers: TierSizes | None = None,
        near: NearPages | None = None,
        shelf: PageShelf | None = None,
    ) -> None:
        assert page_size > 0, f"a page needs a token, got {page_size}"
        assert tiers is None or tiers.num_blocks == num_blocks, "the tiers hold other blocks"
        assert (tiers is None) == (near is None), "tiers and near pages come together"
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.residence = Residence(num_blocks) if tiers is None else TieredResidence(tiers)
        self._near = None if near is None else NearPins(near, self.residence, page_size)
        self._pool = BlockPool(num_blocks)
        self.shelving = None if shelf is None else Shelving(shelf, self.residence, self._pool)
        self._index = PrefixIndex()
        self._pending = PendingPages()
        self._tables: dict[int, BlockTable] = {}

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_usable(self) -> int:
        """Blocks that can be had now: free ones and, by eviction, cached ones."""
        return self._pool.num_free + self._pool.num_cached

    @property
    def num_cached(self) -> int:
        return self._pool.num_cached

    @property
    def num_in_use(self) -> int:
        return self._pool.num_in_use

    def holders(self) -> bytes:
        """A byte for each block, as of ``BlockPool.holders``."""
        return self._pool.holders()

    def num_pages(self, num_tokens: int) -> int:
        """Pages that so many tokens occupy, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def block_ids(self, request: Request) -> Sequence[int]:
        """The request's blocks by page. A view: copy it to keep it."""
        return self._tables[request.index].block_ids

    def num_held(self, request: Request) -> int:
        return len(self._tables[request.index].block_ids)

    def num_shared(self, request: Request) -> int:
        """Leading blocks of a request that others hold as well: they stay when it is preempted."""
        block_ids = self._tables[request.index].block_ids
        shared = takewhile(lambda block_id: self._pool.ref_count(block_id) > 1, block_ids)
        return sum(1 for _ in shared)

    def known(self) -> set[int]:
        """Indices of the requests that were added and not yet removed."""
        return set(self._tables)

    def add(self, request: Request) -> None:
        """Make a request known; it holds nothing yet."""
        assert request.index not in self._tables, f"request index {request.index} is in use"
        self._tables[request.index] = BlockTable(request.cache_salt)

    def remove(self, request: Request) -> None:
        """Forget a request that holds nothing any more."""
        table = self._tables.pop(request.index)
        assert not table.block_ids, f"{request.request_id} still holds blocks"

    def may_share(self, request: Request) -> bool:
        """Whether the request looks for its prefix at all."""
        return self.enable_prefix_caching and request.sampling.prompt_logprobs is None

    def match(self, request: Request) -> Match:
        """Pages of a request that waits which needn't be computed: at most all tokens but one.

        The last token is always computed, since its logits give the next one. A request that
        wants log-probabilities of its prompt computes all of it.
        """
        if not self.may_share(request):
            return Match([], 0)
        table = self._tables[request.index]
        self._digest_pages(request, table, request.num_tokens)
        hits: list[int] = []
        num_idle = 0
        for digest in table.digests[: self._num_matchable(request)]:
            block_id = self._index.block(digest)
            if block_id is None:
                break
            hits.append(block_id)
            num_idle += self._pool.ref_count(block_id) == 0
        return Match(hits, num_idle)

    def awaited(self, request: Request, match: Match) -> tuple[bytes, Request] | None:
        """The last page right after the match that running requests are computing, and by whom.

        None if the next page isn't on its way.
        """
        if not self.may_share(request):
            return None
        found: tuple[bytes, Request] | None = None
        digests = self._tables[request.index].digests
        for digest in digests[len(match.block_ids) : self._num_matchable(request)]:
            leader = self._pending.leader(digest)
            if leader is None:
                break
            found = digest, leader
        return found

    def is_pending(self, digest: bytes) -> bool:
        return digest in self._pending

    def allocate(self, request: Request, match: Match) -> None:
        """Admit a request: it holds the pages it hit, and its other full pages are on their way."""
        table = self._tables[request.index]
        assert not table.block_ids, f"{request.request_id} is admitted twice"
        for block_id in match.block_ids:
            self._pool.hold(block_id)
            self.residence.wake(block_id)
        table.block_ids.extend(match.block_ids)
        table.num_published = len(match.block_ids)
        if self._may_publish(table):
            self._digest_pages(request, table, request.num_tokens)
            to_come = table.digests[table.num_published :]
            missing = [digest for digest in to_come if self._index.block(digest) is None]
            self._pending.expect(request, missing)

    def holds_near(self, num_requests: int, num_tokens: int) -> bool:
        """Whether the device holds what so many running requests and a step's tokens pin at most.

        Always so without a host tier: there all that is held is on the device.
        """
        return self._near is None or self._near.fit(num_requests, num_tokens)

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for tokens [0, num_tokens): the new ones, or None (and none taken) if too few."""
        table = self._tables[request.index]
        missing = max(0, self.num_pages(num_tokens) - len(table.block_ids))
        if missing > self.num_usable:
            return None
        if self._near is not None and not self._near.slide(table, request.num_computed, missing):
            return None
        taken = [self._take() for _ in range(missing)]
        table.block_ids.extend(taken)
        return taken

    def publish(self, request: Request, num_tokens: int) -> list[bytes]:
        """File full pages of tokens [0, num_tokens), whose K/V a finished step has computed.

        A page that another request published first stays private. Returns the digests that
        were pending.
        """
        table = self._tables[request.index]
        num_full = num_tokens // self.page_size
        if num_full <= table.num_published or not self._may_publish(table):
            return []
        self._digest_pages(request, table, num_tokens)
        arrived = []
        for page in range(table.num_published, num_full):
            digest = table.digests[page]
            self._index.insert(digest, table.block_ids[page])
            if self._pending.arrive(digest):
                arrived.append(digest)
        table.num_published = num_full
        return arrived

    def withdraw(self, request: Request) -> list[bytes]:
        """The request stops computing. Returns digests of pages that others awaited from it."""
        table = self._tables[request.index]
        return self._pending.withdraw(request, table.digests[table.num_published :])

    def free(self, request: Request) -> None:
        """Give back all blocks; published ones stay cached, and the last page is evicted first."""
        table = self._tables[request.index]
        if self._near is not None:
            self._near.end(table)
        for block_id in reversed(table.block_ids):
            if self._pool.release(block_id, keep=block_id in self._index):
                self.residence.vacate(block_id)
            elif self._pool.is_cached(block_id):
                self.residence.rest(block_id)
        table.block_ids.clear()
        table.num_published = 0
        table.publishes = True  # what it computes from here on starts afresh

    def retract(self, request: Request) -> None:
        """Take a failed request's pages out of the index: their content may be what broke it."""
        table = self._tables[request.index]
        table.publishes = False
        for block_id in table.block_ids:
            self._index.remove(block_id)

    def lose(self, block_ids: Sequence[int]) -> set[int]:
        """Share these pages no more, their content is gone. Indices of requests that hold one."""
        for block_id in block_ids:
            self._index.remove(block_id)
            if self._pool.is_cached(block_id):
                self._pool.discard(block_id)
                self.residence.vacate(block_id)
        lost = set(block_ids)
        tables = self._tables.items()
        return {index for index, table in tables if not lost.isdisjoint(table.block_ids)}

    def reset(self) -> list[bytes]:
        """Forget all shared content; running requests keep their blocks but publish no more.

        Returns the digests that were pending.
        """
        for table in self._tables.values():
            table.publishes = table.publishes and not table.block_ids
        while self._pool.num_cached:
            self._evict(keep=False)
        if self.shelving is not None:
            self.shelving.shelf.clear()
        self._index.clear()
        return self._pending.clear()

    def take_update(self) -> ResidenceUpdate | None:
        """Where pages live from the next step on, and the copies that takes; None without tiers."""
        return self.residence.take_update()

    def shelved(self, request: Request) -> list[bytes]:
        """Pages on the shelf that follow a request's match, as many as find room."""
        if self.shelving is None or not self.may_share(request):
            return []
        first = len(self.match(request).block_ids)
        digests = self._tables[request.index].digests[first : self._num_matchable(request)]
        return list(islice(takewhile(self.shelving.shelf.__contains__, digests), self.num_usable))

    def restore(self, request: Request, digests: Sequence[bytes]) -> None:
        """Cache pages that follow a request's match; the next step brings their content."""
        assert self.shelving is not None, "pages without a shelf"
        held = list(self.match(request).block_ids)
        for block_id in held:  # these aren't evicted for the pages behind them
            self._pool.hold(block_id)
            self.residence.wake(block_id)
        held += self._file(digests, self.shelving)
        for block_id in reversed(held):
            self._pool.release(block_id, keep=True)
            if self._pool.is_cached(block_id):
                self.residence.rest(block_id)

    def _file(self, digests: Sequence[bytes], shelving: Shelving) -> list[int]:
        """Blocks for pages at hand, each held once; those that find none are given back."""
        taken: list[int] = []
        for at, digest in enumerate(digests):
            if not self.num_usable or not shelving.has_room:
                shelving.shelf.discard(digests[at:])
                break
            if self._index.block(digest) is not None:  # it was computed meanwhile
                shelving.shelf.discard([digest])
            else:
                taken.append(self._take())
                self._index.insert(digest, taken[-1])
                shelving.arriving[taken[-1]] = digest
        return taken

    def check(self) -> None:
        """Free + cached + in use = total; every reference, digest and slot is explained."""
        self._pool.check()
        self._index.check()
        self.residence.check()
        holders: Counter[int] = Counter()
        pins: Counter[int] = Counter()
        for index, table in self._tables.items():
            self._check_table(index, table)
            holders.update(table.block_ids)
            if self._near is not None:
                pins.update(self._near.pinned(table))
        if self.shelving is not None:
            pins.update(list(self.shelving.arriving))
        self.residence.check_pins(pins)
        for block_id in range(self.num_blocks):
            self._check_block(block_id, holders[block_id])

    def _check_table(self, index: int, table: BlockTable) -> None:
        held = table.block_ids
        assert len(set(held)) == len(held), f"request {index} holds a block twice: {held}"
        assert table.num_published <= len(held), f"request {index} published pages it lacks"

    def _check_block(self, block_id: int, holders: int) -> None:
        count = self._pool.ref_count(block_id)
        assert count == holders, f"block {block_id}: count {count}, holders {holders}"
        cached = self._pool.is_cached(block_id)
        filed = block_id in self._index
        assert not cached or filed, f"block {block_id} is cached without a digest"
        assert cached or not self.residence.rests(block_id), f"block {block_id} rests, but is held"
        assert not filed or cached or count, f"block {block_id} is free, yet filed"
        placed = self.residence.slot(block_id) != ABSENT
        assert placed == (cached or count > 0), f"block {block_id}: slot and state disagree"

    def _may_publish(self, table: BlockTable) -> bool:
        return self.enable_prefix_caching and table.publishes

    def _num_matchable(self, request: Request) -> int:
        return (request.num_tokens - 1) // self.page_size

    def _digest_pages(self, request: Request, table: BlockTable, num_tokens: int) -> None:
        digests, size = table.digests, self.page_size
        parent = digests[-1] if digests else root_digest(table.cache_salt)
        for page in range(len(digests), num_tokens // size):
            parent = page_digest(parent, request.token_ids(page * size, (page + 1) * size))
            digests.append(parent)

    def _take(self) -> int:
        if not self._pool.num_free:
            self._evict()
        block_id = self._pool.take()
        self.residence.place(block_id)
        return block_id

    def _evict(self, *, keep: bool = True) -> None:
        block_id = self._pool.evict()
        if self.shelving is not None:
            self.shelving.depart(block_id, self._index.digest(block_id), keep=keep)
        self._index.remove(block_id)
        self.residence.vacate(block_id)
