"""Pages of prefixes on disk: found again, bounded, and absent rather than wrong."""

import errno
import os
from pathlib import Path
from threading import Thread

import pytest

from nsa_serve.memory import page_store
from nsa_serve.memory.page_store import KEY_BYTES, SUFFIX, PageStore

KEY = b"k" * KEY_BYTES
PAGE = 1000


def digest(number):
    return number.to_bytes(KEY_BYTES, "big")


def content(number):
    return bytes((number + at) % 251 for at in range(PAGE))


def open_store(root, **options):
    settings = {"key": KEY, "max_bytes": 1 << 20, "segment_bytes": 4 * PAGE, **options}
    return PageStore(root, page_bytes=PAGE, **settings)


def fill(store, numbers):
    for number in numbers:
        store.put(digest(number), content(number))


def damage_first_page(path):
    raw = bytearray(path.read_bytes())
    raw[-4 * PAGE] ^= 1
    path.write_bytes(raw)


def files(root):
    return sorted(root.glob(f"*/*{SUFFIX}"))


def test_pages_survive_a_restart_in_files_of_the_asked_size(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(10))
    assert [path.stat().st_size >= 4 * PAGE for path in files(tmp_path)] == [True, True]
    assert all(store.get(digest(n)) == content(n) for n in range(10))  # the last two wait
    store.flush()
    again = open_store(tmp_path)
    assert again.num_pages == 10
    assert all(again.get(digest(n)) == content(n) for n in range(10))
    assert again.get(digest(11)) is None
    assert again.num_bytes == sum(path.stat().st_size for path in files(tmp_path))


def test_what_waits_for_a_full_file_is_lost_and_nothing_else(tmp_path):
    fill(open_store(tmp_path), range(6))
    again = open_store(tmp_path)
    assert [digest(n) in again for n in range(6)] == 4 * [True] + 2 * [False]


def test_nobody_else_may_read_them(tmp_path):
    fill(open_store(tmp_path / "new"), range(4))
    (path,) = files(tmp_path / "new")
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_page_is_kept_once(tmp_path):
    store = open_store(tmp_path)
    fill(store, [1, 1, 2, 3, 4, 1, 2, 3, 4])
    assert len(files(tmp_path)) == 1
    assert store.num_pages == 4


@pytest.mark.parametrize("position", [0, 9, 45, 60, 300, 2500, -1])
def test_a_changed_byte_makes_pages_absent_and_never_wrong(tmp_path, position):
    fill(open_store(tmp_path), range(4))
    (path,) = files(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)
    store = open_store(tmp_path)
    found = [store.get(digest(n)) for n in range(4)]
    assert None in found
    assert all(page in (None, content(n)) for n, page in enumerate(found))
    fill(store, range(4))  # computed anew, they are kept anew
    store.flush()
    assert [store.get(digest(n)) for n in range(4)] == [content(n) for n in range(4)]


def test_a_page_that_stands_for_another_is_absent(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(4))
    (path,) = files(tmp_path)
    raw = path.read_bytes()
    pages = len(raw) - 4 * PAGE
    swapped = raw[pages + PAGE : pages + 2 * PAGE] + raw[pages : pages + PAGE]
    path.write_bytes(raw[:pages] + swapped + raw[pages + 2 * PAGE :])
    assert store.get(digest(0)) is None
    assert store.counts.bad_pages == 4


@pytest.mark.parametrize("length", [0, 5, 60, 500, 3000, -1])
def test_a_short_file_is_absent(tmp_path, length):
    fill(open_store(tmp_path), range(4))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    store = open_store(tmp_path)
    assert store.num_pages == 0
    assert all(store.get(digest(n)) is None for n in range(4))


@pytest.mark.parametrize("changed", [{"key": b"x" * KEY_BYTES}, {"key": KEY[:-1] + b"x"}])
def test_another_models_pages_are_absent_and_stay(tmp_path, changed):
    fill(open_store(tmp_path), range(4))
    other = open_store(tmp_path, **changed)
    assert other.num_pages == 0
    assert other.get(digest(1)) is None
    assert open_store(tmp_path).num_pages == 4


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(4))
    foreign = files(tmp_path)[0].with_name("notes" + SUFFIX)
    foreign.write_bytes(b"these are my notes, longer than any head " * 9)
    assert open_store(tmp_path).num_pages == 4
    assert foreign.exists()


def test_the_folder_is_bounded_and_what_was_used_longest_ago_goes_first(tmp_path):
    store = open_store(tmp_path, max_bytes=3 * 4 * PAGE + 2000)
    fill(store, range(12))
    assert len(files(tmp_path)) == 3
    assert store.get(digest(0)) == content(0)
    fill(store, range(12, 16))
    assert digest(0) in store
    assert digest(4) not in store
    assert sum(path.stat().st_size for path in files(tmp_path)) <= store.max_bytes
    smaller = open_store(tmp_path, max_bytes=4 * PAGE + 1000)
    assert [digest(n) in smaller for n in (0, 8, 12)] == [False, False, True]


def test_other_models_files_count_and_go_too(tmp_path):
    fill(open_store(tmp_path, key=b"x" * KEY_BYTES), range(8))
    store = open_store(tmp_path, max_bytes=2 * 4 * PAGE + 1000)
    fill(store, range(4))
    assert len(files(tmp_path)) == 2
    assert store.num_bytes <= store.max_bytes


def test_a_full_disk_is_told_in_one_line_and_what_is_there_is_still_read(
    tmp_path, monkeypatch, caplog
):
    store = open_store(tmp_path)
    fill(store, range(4))

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page_store.os, "fsync", refuse)
    fill(store, range(4, 12))
    assert len([r for r in caplog.records if "No space left on device" in r.message]) == 1
    assert store.counts.dropped_pages == 4
    assert digest(5) not in store
    assert store.get(digest(3)) == content(3)
    assert not list(tmp_path.glob("*/*.part"))


def test_a_file_that_vanishes_is_absent(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(4))
    files(tmp_path)[0].unlink()
    assert store.get(digest(2)) is None
    assert store.num_pages == 0


def test_cleared_pages_are_gone_from_the_disk_too(tmp_path):
    fill(open_store(tmp_path, key=b"x" * KEY_BYTES), range(4))
    store = open_store(tmp_path)
    fill(store, range(6))
    store.clear()
    assert store.num_pages == 0
    assert len(files(tmp_path)) == 1


def test_a_head_that_counts_more_pages_than_there_can_be_is_damage(tmp_path):
    fill(open_store(tmp_path), range(4))
    (path,) = files(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[48:52] = b"\xff" * 4
    path.write_bytes(damaged)
    store = open_store(tmp_path)
    assert store.num_pages == 0
    assert store.counts.bad_pages == 4
    assert not files(tmp_path)


def test_nobody_waits_for_a_file_that_is_being_written(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    found = []

    def ask():
        found.append((digest(1) in store, digest(7) in store, store.get(digest(1))))

    def slow(descriptor):
        asking = Thread(target=ask)
        asking.start()
        asking.join(5)
        found.append("written")

    monkeypatch.setattr(page_store.os, "fsync", slow)
    fill(store, range(4))
    assert found == [(True, False, content(1)), "written"]
    assert store.get(digest(1)) == content(1)


def test_pages_that_are_cleared_while_they_are_written_do_not_come_back(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    monkeypatch.setattr(page_store.os, "fsync", lambda descriptor: store.clear())
    fill(store, range(4))
    assert (store.num_pages, store.num_bytes, files(tmp_path)) == (0, 0, [])


def test_a_disk_that_refuses_to_remove_files_is_only_read(tmp_path, monkeypatch):
    store = open_store(tmp_path, max_bytes=2 * 4 * PAGE + 1000)
    fill(store, range(8))
    damage_first_page(files(tmp_path)[0])

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert [store.get(digest(n)) is None for n in range(8)].count(True) == 4
    monkeypatch.setattr(page_store.os, "open", refuse)
    fill(store, range(8, 16))
    assert not store.is_writing


def test_what_a_killed_server_was_writing_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(4))
    folder = files(tmp_path)[0].parent
    other = tmp_path / "of another model"
    other.mkdir()
    old = [folder / "a.17.part", other / "b.17.part"]
    new = folder / "c.18.part"
    for path in (*old, new):
        path.write_bytes(b"half a file")
    for path in old:
        os.utime(path, (0, 0))
    open_store(tmp_path)
    assert [path.exists() for path in (*old, new)] == [False, False, True]


def test_pages_in_two_files_are_counted_and_cleared_in_both(tmp_path):
    one, two = open_store(tmp_path), open_store(tmp_path)
    fill(one, [0, 1, 2, 3])
    (first,) = files(tmp_path)
    fill(two, [3, 2, 1, 0])
    os.utime(first, (1, 1))
    store = open_store(tmp_path)
    damage_first_page(first)
    assert store.get(digest(0)) is None
    fill(store, [3, 2, 1, 0])  # a file of that name is there
    assert store.num_bytes == sum(path.stat().st_size for path in files(tmp_path))
    fill(two, [4, 5, 6, 7])
    open_store(tmp_path).clear()
    assert not files(tmp_path)
