"""The cache manager: sharing, publishing, eviction and its own books."""

from itertools import count

import pytest

from nsa_serve.cache.manager import CacheManager, Match
from nsa_serve.request import Request, SamplingParams

P = 4


class House:
    """A manager, and requests that have run through it."""

    def __init__(self, num_blocks=16, **options):
        self.cache = CacheManager(num_blocks, P, **options)
        self.index = count()

    def request(self, token_ids, salt="", **sampling):
        index = next(self.index)
        request = Request(
            f"r{index}", token_ids, SamplingParams(**sampling), 0.0, cache_salt=salt, index=index
        )
        self.cache.add(request)
        return request

    def admit(self, token_ids, **options):
        """Admitted and computed to the end: blocks taken, full pages published."""
        request = self.request(token_ids, **options)
        match = self.cache.match(request)
        self.cache.allocate(request, match)
        assert self.cache.extend(request, len(token_ids)) is not None
        self.cache.publish(request, len(token_ids))
        self.cache.check()
        return request, len(match.block_ids)

    def leave(self, request):
        self.cache.withdraw(request)
        self.cache.free(request)
        self.cache.remove(request)
        self.cache.check()

    def hits(self, token_ids, **options):
        request = self.request(token_ids, **options)
        num_hits = len(self.cache.match(request).block_ids)
        self.cache.remove(request)
        return num_hits


@pytest.mark.parametrize(
    ("num_tokens", "pages"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (11, 2), (12, 2), (13, 2)]
)
def test_a_hit_is_whole_published_pages_and_at_most_all_tokens_but_one(num_tokens, pages):
    house = House()
    house.admit(list(range(11)))
    assert house.hits(list(range(num_tokens))) == pages


def test_a_partial_page_is_never_shared():
    house = House()
    first, _ = house.admit(list(range(7)))
    second, hits = house.admit(list(range(7)))
    assert hits == 1
    one, other = house.cache.block_ids(first), house.cache.block_ids(second)
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_pages_not_yet_computed_are_not_hit():
    house = House()
    request = house.request(list(range(9)))
    house.cache.allocate(request, house.cache.match(request))
    house.cache.extend(request, 9)
    assert house.hits(list(range(9))) == 0
    house.cache.publish(request, 7)
    assert house.hits(list(range(9))) == 1


def test_two_salts_never_share():
    house = House()
    house.admit(list(range(9)), salt="one")
    assert house.hits(list(range(9)), salt="two") == 0
    assert house.hits(list(range(9)), salt="one") == 2


def test_a_request_for_prompt_logprobs_computes_all_of_its_prompt():
    house = House()
    house.admit(list(range(9)))
    assert house.hits(list(range(9)), prompt_logprobs=1) == 0


def test_without_prefix_caching_nothing_is_kept():
    house = House(enable_prefix_caching=False)
    request, _ = house.admit(list(range(9)))
    house.leave(request)
    assert house.cache.num_cached == 0
    assert house.hits(list(range(9))) == 0


def test_the_later_of_two_equal_pages_stays_private_and_is_not_kept():
    house = House()
    tokens = list(range(9))
    first, second = house.request(tokens), house.request(tokens)
    for request in (first, second):
        house.cache.allocate(request, Match([], 0))
        house.cache.extend(request, 9)
    for request in (first, second):
        house.cache.publish(request, 9)
    house.cache.check()
    assert set(house.cache.block_ids(first)).isdisjoint(house.cache.block_ids(second))
    house.leave(second)
    assert house.cache.num_cached == 0
    house.leave(first)
    assert house.cache.num_cached == 2


def test_freed_pages_are_hit_again_until_they_are_evicted():
    house = House(num_blocks=4)
    request, _ = house.admit(list(range(12)))
    house.leave(request)
    assert (house.cache.num_cached, house.cache.num_usable) == (3, 4)
    again, hits = house.admit(list(range(12)))
    assert hits == 2
    house.leave(again)
    other, _ = house.admit(list(range(100, 116)))
    assert house.cache.num_cached == 0
    house.leave(other)
    assert house.hits(list(range(12))) == 0


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    house = House(num_blocks=4)
    request, _ = house.admit(list(range(16)))
    house.leave(request)
    other, _ = house.admit([77])
    assert house.hits(list(range(17))) == 3
    house.leave(other)


def test_what_was_used_last_is_evicted_last():
    house = House(num_blocks=4)
    old, _ = house.admit([1] * 8)
    house.leave(old)
    new, _ = house.admit([2] * 8)
    house.leave(new)
    again, hits = house.admit([1] * 9)  # two hits, and a third page
    assert hits == 2
    house.leave(again)
    assert house.hits([2] * 9) == 1
    assert house.hits([1] * 9) == 2


def test_extend_takes_all_or_nothing():
    house = House(num_blocks=3)
    request = house.request([1] * 9)
    house.cache.allocate(request, house.cache.match(request))
    assert house.cache.extend(request, 5) == [0, 1]
    assert house.cache.extend(request, 8) == []
    assert house.cache.extend(request, 17) is None
    assert house.cache.num_held(request) == 2
    house.cache.check()


def test_an_idle_hit_counts_against_what_is_usable():
    house = House()
    request, _ = house.admit(list(range(9)))
    asked = house.request(list(range(9)))
    assert house.cache.match(asked).num_idle == 0
    house.leave(request)
    assert house.cache.match(asked).num_idle == 2


def test_a_page_on_its_way_is_awaited_from_whoever_computes_it():
    house = House()
    leader, follower = house.request(list(range(9))), house.request(list(range(9)))
    house.cache.allocate(leader, house.cache.match(leader))
    match = house.cache.match(follower)
    digest, who = house.cache.awaited(follower, match)
    assert who is leader
    house.cache.extend(leader, 9)
    assert digest not in house.cache.publish(leader, 4)
    assert digest in house.cache.publish(leader, 8)
    assert house.cache.awaited(follower, house.cache.match(follower)) is None


def test_a_leader_that_leaves_names_the_pages_it_owes():
    house = House()
    leader, follower = house.request(list(range(9))), house.request(list(range(9)))
    house.cache.allocate(leader, house.cache.match(leader))
    digest, _ = house.cache.awaited(follower, house.cache.match(follower))
    assert digest in house.cache.withdraw(leader)
    assert house.cache.awaited(follower, house.cache.match(follower)) is None


def test_pages_of_a_failed_request_are_hit_by_nobody():
    house = House()
    request, _ = house.admit(list(range(9)))
    house.cache.retract(request)
    house.cache.publish(request, 9)
    house.cache.check()
    assert house.hits(list(range(9))) == 0
    house.leave(request)
    assert house.cache.num_usable == 16
    assert house.cache.num_cached == 0


def test_reset_forgets_everything_and_running_requests_publish_no_more():
    house = House()
    gone, _ = house.admit([5] * 9)
    house.leave(gone)
    request, _ = house.admit(list(range(9)))
    house.cache.reset()
    house.cache.check()
    assert house.cache.num_cached == 0
    assert house.hits([5] * 9) == 0
    assert house.hits(list(range(9))) == 0
    request.output_token_ids.extend([1] * 8)
    house.cache.extend(request, 17)
    house.cache.publish(request, 17)
    house.admit(list(range(9)))
    assert house.hits([*range(9), *[1] * 8]) == 2


def test_a_request_leaves_with_empty_hands_only():
    house = House()
    request, _ = house.admit([1])
    with pytest.raises(AssertionError, match="still holds blocks"):
        house.cache.remove(request)


def test_check_finds_a_leaked_reference():
    house = House()
    request, _ = house.admit(list(range(9)))
    house.cache._tables[request.index].block_ids.pop()
    with pytest.raises(AssertionError, match="count 1, holders 0"):
        house.cache.check()


def test_check_finds_a_block_of_two_owners():
    house = House()
    first, _ = house.admit([1])
    second, _ = house.admit([2])
    house.cache._tables[second.index].block_ids[0] = house.cache.block_ids(first)[0]
    with pytest.raises(AssertionError, match="holders 2"):
        house.cache.check()


def test_check_finds_a_cached_block_without_a_digest():
    house = House()
    request, _ = house.admit(list(range(9)))
    house.leave(request)
    house.cache._index.clear()
    with pytest.raises(AssertionError, match="cached without a digest"):
        house.cache.check()
