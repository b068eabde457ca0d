"""Block pool, prefix index and residence, each alone."""

import pytest

from nsa_serve.cache.blocks import KEPT, BlockPool
from nsa_serve.cache.prefix import PendingPages, PrefixIndex, page_digest, root_digest
from nsa_serve.cache.residence import ABSENT, Residence
from nsa_serve.request import Request, SamplingParams


def test_each_block_is_free_cached_or_in_use():
    pool = BlockPool(4)
    first, second = pool.take(), pool.take()
    assert (pool.num_free, pool.num_cached, pool.num_in_use) == (2, 0, 2)
    assert not pool.release(first, keep=True)
    assert pool.release(second, keep=False)
    assert (pool.num_free, pool.num_cached, pool.num_in_use) == (3, 1, 0)
    pool.check()


def test_a_shared_block_stays_in_use_until_its_last_holder_leaves():
    pool = BlockPool(2)
    block_id = pool.take()
    pool.hold(block_id)
    assert not pool.release(block_id, keep=False)
    assert pool.num_in_use == 1
    assert pool.release(block_id, keep=False)
    assert pool.num_in_use == 0


def test_a_map_tells_free_kept_held_and_shared_apart():
    pool = BlockPool(5)
    first, second, third = pool.take(), pool.take(), pool.take()
    pool.hold(second)
    pool.release(third, keep=True)
    assert list(pool.holders()) == [1, 2, KEPT, 0, 0]
    for _ in range(400):
        pool.hold(first)
    assert pool.holders()[first] == KEPT - 1


def test_the_least_recently_used_block_is_evicted_first():
    pool = BlockPool(3)
    a, b, c = pool.take(), pool.take(), pool.take()
    for block_id in (a, b, c):
        pool.release(block_id, keep=True)
    pool.hold(a)
    pool.release(a, keep=True)
    assert [pool.evict() for _ in range(3)] == [b, c, a]


def test_a_block_released_too_often_is_our_mistake():
    pool = BlockPool(1)
    block_id = pool.take()
    pool.release(block_id, keep=False)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(block_id, keep=False)


def test_check_finds_a_lost_block():
    pool = BlockPool(2)
    pool.take()
    pool._ref_counts[0] = 0
    with pytest.raises(AssertionError, match="count and state disagree"):
        pool.check()


def test_digests_depend_on_every_earlier_token_on_order_and_on_the_salt():
    root = root_digest("")
    assert page_digest(root, [1, 2]) == page_digest(root, [1, 2])
    assert page_digest(root, [1, 2]) != page_digest(root, [2, 1])
    assert page_digest(root, [1, 2]) != page_digest(root_digest("tenant"), [1, 2])
    one, other = page_digest(root, [1, 2]), page_digest(root, [1, 3])
    assert page_digest(one, [5, 6]) != page_digest(other, [5, 6])


def test_a_salt_cannot_imitate_a_page():
    forged = root_digest((root_digest("") + bytes(16)).decode("latin-1"))
    assert forged != page_digest(root_digest(""), [0, 0])


def test_the_index_keeps_the_first_block_of_a_content():
    index = PrefixIndex()
    assert index.insert(b"x", 1)
    assert not index.insert(b"x", 2)
    assert index.block(b"x") == 1
    assert 2 not in index
    index.remove(2)
    index.check()
    index.remove(1)
    assert index.block(b"x") is None
    assert len(index) == 0


def test_only_its_leader_withdraws_a_pending_page():
    first, second = (
        Request(name, [1], SamplingParams(), 0.0, index=i) for i, name in enumerate("ab")
    )
    pending = PendingPages()
    pending.expect(first, [b"x", b"y"])
    pending.expect(second, [b"y", b"z"])
    assert pending.leader(b"y") is first
    assert pending.withdraw(second, [b"y", b"z"]) == [b"z"]
    assert pending.arrive(b"x")
    assert not pending.arrive(b"x")
    assert pending.clear() == [b"y"]


def test_without_a_host_tier_a_block_lives_in_the_slot_of_its_number():
    residence = Residence(3)
    residence.place(2)
    assert residence.slot(2) == 2
    assert residence.slot(0) == ABSENT
    residence.vacate(2)
    assert residence.slot(2) == ABSENT
    residence.check()
