"""Pages of prefixes in files: found again after a restart, never trusted without their checksum.

A file holds some pages of one model: a head with their digests and checksums, then the pages. It
is written whole under another name and renamed, and never changed. Files that were used longest ago
go first when the folder is full.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Lock, RLock

logger = logging.getLogger(__name__)

KEY_BYTES = 32  # of a model's key, and of a page's digest
SUFFIX = ".pages"
_UNFINISHED = ".part"
_ABANDONED_SECONDS = 600.0  # nobody writes one file for so long
_MAGIC = b"NSAPAGE1"
_SUM_BYTES = 16
_HEAD = struct.Struct(f"<8s{KEY_BYTES}sQI")  # magic, model's key, bytes of a page, pages
_ENTRY = struct.Struct(f"<{KEY_BYTES}s{_SUM_BYTES}s")  # digest, checksum
# Files of less would take more time to open than to read.
SEGMENT_BYTES = 16 << 20


@dataclass(slots=True)
class StoreCounts:
    """What went through the files."""

    written_pages: int = 0
    read_pages: int = 0
    bad_pages: int = 0  # unreadable, short or with a wrong checksum: taken for absent
    dropped_pages: int = 0  # not written, because the disk was too slow or refused


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page lies."""

    path: Path
    offset: int
    checksum: bytes


@dataclass(slots=True)
class _File:
    num_bytes: int
    is_ours: bool  # not of another model
    digests: list[bytes] = field(default_factory=list)  # of pages that no file before it has


class PageStore:
    """Pages of ``page_bytes`` each under ``root``, at most ``max_bytes`` with other models' files.

    ``key`` [KEY_BYTES] names everything that a page's bytes depend on beside its tokens. Any
    thread may call any method, and waits for the disk in ``get``, ``flush``, ``clear`` and in a
    ``put`` that fills a file; nobody waits for what others do there. A file that can't be read, is
    short, or has another content than its checksums say is removed, and its pages are absent; one
    of another kind is left alone.
    """

    def __init__(
        self,
        root: Path,
        key: bytes,
        page_bytes: int,
        max_bytes: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.counts = StoreCounts()
        self.page_bytes = page_bytes
        self.max_bytes = max_bytes
        self.is_writing = True
        self._key = key
        self._root = root
        self._folder = root / key.hex()[:16]
        self._pages_per_file = -(-segment_bytes // page_bytes)
        self._open: dict[bytes, bytes] = {}  # pages of the file to come
        self._places: dict[bytes, _Place] = {}
        self._files: OrderedDict[Path, _File] = OrderedDict()  # used longest ago first
        self._num_bytes = 0
        self._num_clears = 0
        self._lock = RLock()  # never held over a read or a write of pages
        self._one_writes = Lock()
        # Pages are made from what users wrote: nobody else may read them.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_abandoned()
        self._find_files()
        _unlink(self._make_room(0))

    def __contains__(self, digest: bytes) -> bool:
        with self._lock:
            return digest in self._places or digest in self._open

    @property
    def num_pages(self) -> int:
        return len(self._places) + len(self._open)

    @property
    def num_bytes(self) -> int:
        """Of all files, other models' among them."""
        return self._num_bytes

    def put(self, digest: bytes, page: bytes) -> None:
        """Keep a page; it is written as soon as there are enough for a file."""
        assert len(page) == self.page_bytes, f"{len(page)} bytes are no page"
        with self._lock:
            if not self.is_writing or digest in self:
                return
            self._open[digest] = page
            is_full = len(self._open) >= self._pages_per_file
        if is_full:
            self.flush()

    def get(self, digest: bytes) -> bytes | None:
        """A page whose checksum is right, or None."""
        with self._lock:
            waiting = self._open.get(digest)
            place = self._places.get(digest)
        if waiting is not None or place is None:
            return waiting
        page = self._read(place)
        if page is None or self._checksum(digest, page) != place.checksum:
            self._remove_bad(place.path)
            return None
        self._use(place.path)
        self.counts.read_pages += 1
        return page

    def flush(self) -> None:
        """Write what waits for a full file. Until it is written it can be had from memory."""
        with self._one_writes:
            with self._lock:
                pages = dict(self._open)
            if pages and self.is_writing:
                self._write(pages)
            with self._lock:
                for digest in pages:
                    self._open.pop(digest, None)

    def clear(self) -> None:
        """Forget all pages of this model, and remove their files."""
        with self._lock:
            self._num_clears += 1
            self._open.clear()
            ours = [path for path, file in self._files.items() if file.is_ours]
            for path in ours:
                self._forget(path)
        _unlink(ours)

    def _remove_abandoned(self) -> None:
        """Files that were being written when their server was killed, whichever it was."""
        for path in self._root.glob(f"*/*{_UNFINISHED}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def _find_files(self) -> None:
        """Take in what earlier runs have left, of this model and of others."""
        found = []
        for path in self._root.glob(f"*/*{SUFFIX}"):
            try:
                found.append((path.stat().st_mtime_ns, path, path.stat().st_size))
            except OSError:
                continue  # another server has just removed it
        for _, path, size in sorted(found):
            if path.parent != self._folder:
                self._files[path] = _File(size, is_ours=False)
                self._num_bytes += size
            else:
                self._take_in(path, size)

    def _take_in(self, path: Path, size: int) -> None:
        head = self._read_head(path, size)
        if head is None:
            return  # not one of ours
        count, entries = head
        if entries is None:
            logger.warning("%s is short or damaged, and is removed", path)
            self.counts.bad_pages += count
            _unlink([path])
            return
        self._file(path, size, entries)

    def _file(self, path: Path, size: int, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """The file is there, with pages of these digests and checksums."""
        self._forget(path)
        file = self._files[path] = _File(size, is_ours=True)
        self._num_bytes += size
        pages = list(entries)
        first = size - len(pages) * self.page_bytes
        for at, (digest, checksum) in enumerate(pages):
            if digest not in self._places:
                self._places[digest] = _Place(path, first + at * self.page_bytes, checksum)
                file.digests.append(digest)

    def _size(self, num_pages: int) -> int:
        """Bytes of a file of so many pages."""
        return _HEAD.size + num_pages * (_ENTRY.size + self.page_bytes) + _SUM_BYTES

    def _read_head(
        self, path: Path, size: int
    ) -> tuple[int, list[tuple[bytes, bytes]] | None] | None:
        """(pages, their digests and checksums or None if damaged); None for a foreign file."""
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD.size)
                if len(head) < _HEAD.size or not head.startswith(_MAGIC):
                    return None
                _, key, page_bytes, count = _HEAD.unpack(head)
                if key != self._key or page_bytes != self.page_bytes:
                    return None
                if size != self._size(count):
                    return max(0, size - _HEAD.size) // self.page_bytes, None
                table = file.read(count * _ENTRY.size)
                checksum = file.read(_SUM_BYTES)
        except OSError:
            return None
        if len(table) < count * _ENTRY.size or _sum(head, table) != checksum:
            return count, None
        return count, list(_ENTRY.iter_unpack(table))

    def _write(self, pages: Mapping[bytes, bytes]) -> None:
        count = len(pages)
        sums = {digest: self._checksum(digest, page) for digest, page in pages.items()}
        head = _HEAD.pack(_MAGIC, self._key, self.page_bytes, count)
        table = b"".join(_ENTRY.pack(digest, checksum) for digest, checksum in sums.items())
        size = self._size(count)
        with self._lock:
            num_clears = self._num_clears
            gone = self._make_room(size)
        _unlink(gone)
        # Named by its content: two servers that share a folder write the same file.
        path = self._folder / (_sum(table).hex() + SUFFIX)
        try:
            _write_whole(path, [head, table, _sum(head, table), *pages.values()])
        except OSError as error:
            self._stop_writing(error, count)
            return
        with self._lock:
            if num_clears == self._num_clears:
                self.counts.written_pages += count
                self._file(path, size, sums.items())
                return
        _unlink([path])  # its pages were forgotten meanwhile

    def _stop_writing(self, error: OSError, num_pages: int) -> None:
        logger.error(
            "--kv-disk-dir %s can't be written (%s): no more prefixes are kept there; "
            "nothing else is lost",
            self._root,
            error.strerror or error,
        )
        self.is_writing = False
        self.counts.dropped_pages += num_pages

    def _make_room(self, num_bytes: int) -> list[Path]:
        """Forget files until there is room; these are to be removed."""
        gone = []
        while self._files and self._num_bytes + num_bytes > self.max_bytes:
            gone.append(next(iter(self._files)))
            self._forget(gone[-1])
        return gone

    def _forget(self, path: Path) -> None:
        file = self._files.pop(path, None)
        if file is None:
            return
        self._num_bytes -= file.num_bytes
        for digest in file.digests:
            del self._places[digest]

    def _remove_bad(self, path: Path) -> None:
        with self._lock:
            if path not in self._files:
                return
            logger.warning("%s is damaged, and is removed: its prefixes are computed", path)
            self.counts.bad_pages += len(self._files[path].digests)
            self._forget(path)
        _unlink([path])

    def _read(self, place: _Place) -> bytes | None:
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                return file.read(self.page_bytes)
        except OSError:
            return None

    def _use(self, path: Path) -> None:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
        try:
            os.utime(path)  # so that the order lasts over a restart
        except OSError:
            return  # removed meanwhile, or on a disk that is read-only now

    def _checksum(self, digest: bytes, page: bytes) -> bytes:
        return _sum(self._key, digest, page)


def _sum(*parts: bytes) -> bytes:
    found = blake2b(digest_size=_SUM_BYTES)
    for part in parts:
        found.update(part)
    return found.digest()


def _unlink(paths: Iterable[Path]) -> None:
    """Remove files that nobody reads any more; what the disk refuses to remove stays there."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _write_whole(path: Path, parts: list[bytes]) -> None:
    """All of the file or none of it, whenever the system stops."""
    temporary = path.with_suffix(f".{os.getpid()}{_UNFINISHED}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
