"""The sizes that the tests of the host tier on a GPU rest on, without a GPU."""

import pytest

from .spilling import STEPS, TIGHT, conversations, simulate


@pytest.mark.parametrize("count", [160, 500])
def test_running_requests_of_the_tight_cache_choose_among_spilled_pages(count: int) -> None:
    found = simulate(conversations(count), **STEPS, **TIGHT)
    assert found.finished == count
    # Far more often than once a step some page that may be chosen is in host memory.
    assert found.selectable_away > 50 * found.steps
    assert found.pages_out > 10 * count
    assert found.pages_in > 0


def test_in_a_cache_of_all_pages_nothing_that_may_be_chosen_is_away() -> None:
    found = simulate(conversations(60), **STEPS, **TIGHT | {"kv_cache_memory_bytes": 4 << 30})
    assert (found.selectable_away, found.pages_in) == (0, 0)
