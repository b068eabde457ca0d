"""The disk tier of prefixes: pages between a cache's memory and a store of files, on threads."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition

import torch

from ..schedule.plan import DiskReport, PageAt
from .device_pool import DevicePool
from .page_store import PageStore
from .tier import HostTier

logger = logging.getLogger(__name__)

Tensor = torch.Tensor

# Pages at hand that no step has loaded yet, and pages that wait to be written, take at most this.
_AT_HAND_BYTES = 4 << 30
_QUEUED_BYTES = 1 << 30
_REST_SECONDS = 0.005


@dataclass(slots=True)
class _Fetched:
    """A page that is at hand, and for how many fetches."""

    page: bytes
    num_wanted: int


class DiskTier:
    """Saves pages that are evicted, and loads pages of prompts that begin as earlier ones did.

    Files are read and written on a thread each; a step only copies between memories. A page is its
    keys and values of all layers and then its compressed entries.
    """

    def __init__(self, store: PageStore, pool: DevicePool, host: HostTier | None = None) -> None:
        self.store = store
        self._pool = pool
        self._host = host
        self._at_hand: dict[bytes, _Fetched] = {}
        self._num_asked = 0  # pages of fetches under way
        self._ended: list[tuple[int, list[bytes]]] = []
        self._next_fetch = 0
        self._num_queued = 0  # pages to be written
        self._changed = Condition()
        self._lost: list[int] = []
        self._reader = ThreadPoolExecutor(1, "read-pages")
        self._writer = ThreadPoolExecutor(1, "write-pages")
        atexit.register(store.flush)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.store

    def fetch(self, digests: Sequence[bytes]) -> int:
        with self._changed:
            number, self._next_fetch = self._next_fetch, self._next_fetch + 1
            limit = _AT_HAND_BYTES // self.store.page_bytes
            room = max(0, limit - self._num_asked - len(self._at_hand))
            asked = list(digests[:room])
            self._num_asked += len(asked)
        self._reader.submit(self._read, number, asked)
        return number

    def take_fetched(self) -> list[tuple[int, list[bytes]]]:
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def discard(self, digests: Sequence[bytes]) -> None:
        with self._changed:
            for digest in digests:
                self._take(digest)

    def rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ended), _REST_SECONDS)

    def clear(self) -> None:
        self.store.clear()

    def save(self, departing: Sequence[PageAt]) -> None:
        """Have pages written as they are now; what is queued later may change them."""
        room = _QUEUED_BYTES // self.store.page_bytes - self._num_queued
        self.store.counts.dropped_pages += max(0, len(departing) - room)
        pages = departing[: max(0, room)]
        if not pages or not self.store.is_writing:
            return
        try:
            self._queue(pages)
        except torch.AcceleratorError:
            raise  # the device is lost, and all pages with it
        except (RuntimeError, MemoryError):
            logger.exception("%d pages could not be queued for the disk", len(pages))
            self.store.counts.dropped_pages += len(pages)

    def load(self, arriving: Sequence[PageAt]) -> None:
        """Put pages that are at hand into their places; those of ``take_lost`` are not there."""
        for page in arriving:
            with self._changed:
                content = self._take(page.digest)
            try:
                self._place(page, content)
            except torch.AcceleratorError:
                raise  # the device is lost, and all pages with it
            except (RuntimeError, MemoryError):
                logger.exception("a page from the disk could not be loaded")
                self._lost.append(page.block_id)

    def take_lost(self) -> list[int]:
        """Blocks that could not be loaded, since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Write what waits, and end the threads."""
        for pool in (self._reader, self._writer):
            pool.shutdown()
        atexit.unregister(self.store.flush)
        self.store.flush()

    def report(self) -> DiskReport:
        counts, size = self.store.counts, self.store.page_bytes
        return DiskReport(
            num_bytes=self.store.num_bytes,
            written_bytes=counts.written_pages * size,
            read_bytes=counts.read_pages * size,
            bad_pages=counts.bad_pages,
            dropped_pages=counts.dropped_pages,
        )

    def _read(self, number: int, digests: list[bytes]) -> None:
        """On the reader's thread: leading pages up to the first that isn't there."""
        found: list[bytes] = []
        try:
            self._bring(digests, found)
        except Exception:  # a request waits for the end of this fetch, whatever becomes of it
            logger.exception("pages could not be read from the disk")
        with self._changed:
            self._num_asked -= len(digests)
            self._ended.append((number, found))
            self._changed.notify_all()

    def _bring(self, digests: list[bytes], found: list[bytes]) -> None:
        """Put pages to hand, and their digests into ``found`` one by one."""
        for digest in digests:
            page = self.store.get(digest)
            if page is None:
                return
            with self._changed:
                entry = self._at_hand.setdefault(digest, _Fetched(page, 0))
                entry.num_wanted += 1
            found.append(digest)

    def _take(self, digest: bytes) -> bytes:
        """A page at hand, for one of the fetches that brought it."""
        entry = self._at_hand[digest]
        entry.num_wanted -= 1
        if not entry.num_wanted:
            del self._at_hand[digest]
        return entry.page

    def _queue(self, pages: Sequence[PageAt]) -> None:
        copies, done = self._copied(pages)
        digests = [page.digest for page in pages]
        with self._changed:
            self._writer.submit(self._write, digests, copies, done)  # no thread may be to be had
            self._num_queued += len(pages)

    def _write(self, digests: list[bytes], copies: Tensor, done: torch.cuda.Event | None) -> None:
        """On the writer's thread."""
        try:
            if done is not None:
                done.synchronize()
            for digest, page in zip(digests, copies.view(torch.uint8).numpy(), strict=True):
                self.store.put(digest, page.tobytes())
        except Exception:
            logger.exception("%d pages could not be written to the disk", len(digests))
        with self._changed:
            self._num_queued -= len(digests)

    def _copied(self, pages: Sequence[PageAt]) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copies [pages, values of a page] on the host, complete once the event has come."""
        pool, host = self._pool, self._host
        num_raw = pool.layout.slot_elements
        size = num_raw + pool.layout.entry_elements
        on_cuda = pool.device.type == "cuda"
        copies = torch.empty(len(pages), size, dtype=pool.layout.dtype, pin_memory=on_cuda)
        if host is not None and any(page.slot >= pool.num_slots for page in pages):
            host.settle()
        for copy, page in zip(copies, pages, strict=True):
            if page.slot < pool.num_slots:
                copy[:num_raw].copy_(pool.pages[page.slot], non_blocking=True)
            else:
                assert host is not None, f"slot {page.slot} of {pool.num_slots}"
                copy[:num_raw].copy_(host.host.pages[page.slot - pool.num_slots])
            entries = pool.entries[:, page.block_id]
            copy[num_raw:].view_as(entries).copy_(entries, non_blocking=True)
        return copies, _mark() if on_cuda else None

    def _place(self, page: PageAt, content: bytes) -> None:
        pool = self._pool
        values = torch.frombuffer(bytearray(content), dtype=pool.layout.dtype)
        if pool.device.type == "cuda":
            values = values.pin_memory()  # else the copy waits for the steps before it
        num_raw = pool.layout.slot_elements
        pool.pages[page.slot].copy_(values[:num_raw], non_blocking=True)
        entries = pool.entries[:, page.block_id]
        entries.copy_(values[num_raw:].view_as(entries), non_blocking=True)


def _mark() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
