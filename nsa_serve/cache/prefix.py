"""Content of full pages to block: chained digests, a page's key covers all tokens up to its end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from ..request import Request

# 256 bits: clients choose the tokens, so equal digests must be out of reach, not just unlikely.
DIGEST_BYTES = 32


def root_digest(cache_salt: str) -> bytes:
    """What the first page's digest is chained to: requests of other salts never meet."""
    return blake2b(cache_salt.encode(), digest_size=DIGEST_BYTES, person=b"root").digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full page, given the digest of the page before it."""
    tokens = array("q", token_ids).tobytes()
    return blake2b(parent + tokens, digest_size=DIGEST_BYTES, person=b"page").digest()


class PrefixIndex:
    """Which block holds the page of a digest. One block a digest, one digest a block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._digests

    def block(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def digest(self, block_id: int) -> bytes:
        """What a filed block holds."""
        return self._digests[block_id]

    def insert(self, digest: bytes, block_id: int) -> bool:
        """File the block, unless another one holds the same content already."""
        if digest in self._blocks:
            return False
        assert block_id not in self._digests, f"block {block_id} is filed under another digest"
        self._blocks[digest] = block_id
        self._digests[block_id] = digest
        return True

    def remove(self, block_id: int) -> None:
        """Forget a block's content; nothing happens if it isn't filed."""
        digest = self._digests.pop(block_id, None)
        if digest is not None:
            del self._blocks[digest]

    def clear(self) -> None:
        self._blocks.clear()
        self._digests.clear()

    def check(self) -> None:
        """Both directions say the same."""
        mirrored = {digest: block_id for block_id, digest in self._digests.items()}
        assert mirrored == self._blocks, "the index's two directions disagree"


class PendingPages:
    """Full pages that a running request is computing now, by digest: who will publish them.

    Others that need such a page may wait for it rather than compute it a second time.
    """

    def __init__(self) -> None:
        self._leaders: dict[bytes, Request] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._leaders

    def leader(self, digest: bytes) -> Request | None:
        """The request that computes the page, None if nobody does."""
        return self._leaders.get(digest)

    def expect(self, leader: Request, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self._leaders.setdefault(digest, leader)

    def arrive(self, digest: bytes) -> bool:
        """The page was published. Says whether it was pending."""
        return self._leaders.pop(digest, None) is not None

    def withdraw(self, leader: Request, digests: Sequence[bytes]) -> list[bytes]:
        """The leader won't compute these any more. Returns those it was to publish."""
        gone = [digest for digest in digests if self._leaders.get(digest) is leader]
        for digest in gone:
            del self._leaders[digest]
        return gone

    def clear(self) -> list[bytes]:
        gone = list(self._leaders)
        self._leaders.clear()
        return gone
