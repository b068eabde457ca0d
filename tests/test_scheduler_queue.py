"""What is let into the queue, and when those who are sent away may come back."""

import pytest

from nsa_serve.errors import InvalidParameter, Overloaded, PromptTooLong

from .fake_runner import Harness


def test_an_empty_prompt_a_taken_id_and_zero_tokens_are_refused():
    house = Harness()
    with pytest.raises(InvalidParameter, match="empty"):
        house.add("a", [])
    with pytest.raises(InvalidParameter, match="max_tokens"):
        house.add("a", [1], max_tokens=0)
    house.add("a", [1])
    with pytest.raises(InvalidParameter, match="'a' is running already"):
        house.add("a", [1])
    assert house.scheduler.stats.num_rejected == 3
    house.drain()


def test_more_than_the_context_is_refused_with_the_numbers():
    house = Harness(max_model_len=20)
    with pytest.raises(PromptTooLong, match=r"maximum context length is 20 tokens\. However") as e:
        house.add("a", [1] * 15, max_tokens=6)
    assert "21 tokens (15 in the prompt, 6 to generate)" in str(e.value)
    house.add("b", [1] * 15, max_tokens=5, ignore_eos=True)
    house.drain()
    assert len(house.outputs["b"]) == 5


def test_more_than_the_whole_cache_is_refused_and_exactly_all_of_it_runs():
    house = Harness(num_blocks=4, page_size=4)
    with pytest.raises(PromptTooLong, match="cache holds 16 tokens"):
        house.add("a", [1] * 10, max_tokens=8)
    house.add("b", [1] * 10, max_tokens=7, ignore_eos=True)
    house.drain()
    assert len(house.outputs["b"]) == 7


def test_a_full_queue_says_when_to_come_back():
    house = Harness(max_num_queued_reqs=2)
    house.add("a", [1])
    house.add("b", [1])
    with pytest.raises(Overloaded, match="2 requests wait") as e:
        house.add("c", [1])
    assert e.value.retry_after == 1
    house.step()
    house.add("c", [1])
    house.drain()


def test_a_queue_full_of_tokens_refuses_but_an_empty_one_takes_any_prompt():
    house = Harness(max_num_queued_tokens=10)
    house.add("a", [1] * 12)
    with pytest.raises(Overloaded, match="12 prompt tokens"):
        house.add("b", [1])
    house.drain()


def test_retry_after_is_the_time_to_compute_half_of_the_queue_at_the_measured_speed():
    house = Harness(max_num_queued_reqs=3, budget=5)
    house.add("measured", [1] * 20, max_tokens=1)
    house.drain()  # a step takes a second here: 5 tokens a second
    for i in range(3):
        house.add(f"r{i}", [1] * 40, max_tokens=1)
    with pytest.raises(Overloaded, match="try again in 12 s") as e:
        house.add("more", [1])
    assert e.value.retry_after == 12
    assert house.scheduler.snapshot().retry_after == 12
    assert house.scheduler.snapshot().prefill_tokens_per_s == pytest.approx(5)


def test_retry_after_covers_what_a_queue_full_of_tokens_lacks_for_this_prompt():
    house = Harness(max_num_queued_tokens=50, budget=5)
    house.add("measured", [1] * 20, max_tokens=1)
    house.drain()
    house.add("waits", [1] * 20, max_tokens=1)
    with pytest.raises(Overloaded) as e:
        house.add("more", [1] * 60, max_tokens=1)
    assert e.value.retry_after == 6  # 30 tokens too many


def test_while_nothing_of_the_queue_is_computed_retry_after_grows_to_its_limit():
    house = Harness(max_num_queued_reqs=1, num_blocks=8, page_size=4)
    house.add("runs", [1] * 4, max_tokens=28, ignore_eos=True)
    house.step()
    house.add("waits", [2] * 20, max_tokens=1)
    seconds = []
    for _ in range(20):
        house.step()
        seconds.append(house.scheduler.snapshot().retry_after)
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]
    house.drain()
