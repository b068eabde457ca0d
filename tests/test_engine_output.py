"""A request's output: text in whole characters, stop strings, usage, log-probabilities."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.config import ModelSource
from nsa_serve.engine.output import OutputState
from nsa_serve.engine.stops import StopMatcher
from nsa_serve.models.checkpoint import resolve
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from nsa_serve.tokenizer import Tokenizer, read_source


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(read_source(resolve(ModelSource())))


def first_end(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first stop string is complete, by trying every end; the longest of those there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def cut(text: str, stops: tuple[str, ...], include: bool = False) -> str:
    match = first_end(text, stops)
    if match is None:
        return text
    end, stop = match
    return text[: end if include else end - len(stop)]


def run_matcher(parts: list[str], stops: tuple[str, ...], include: bool = False) -> str:
    matcher = StopMatcher(stops, include_stop=include)
    return "".join([matcher.feed(part) for part in parts]) + matcher.flush()


LETTERS = st.text("ab-", max_size=14)


@given(
    text=LETTERS,
    stops=st.lists(st.text("ab-", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=6),
    include=st.booleans(),
)
def test_pieces_add_up_to_the_text_cut_at_the_stop_however_it_was_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run_matcher(parts, tuple(stops), include) == cut(text, tuple(stops), include)


@pytest.mark.parametrize("border", range(1, 8))
def test_a_stop_string_is_found_over_every_border(border: int) -> None:
    text = "ab<STOP>cd"
    matcher = StopMatcher(("<STOP>",))
    given_out = matcher.feed(text[: border + 1])
    assert "<" not in given_out
    given_out += matcher.feed(text[border + 1 :]) + matcher.flush()
    assert (given_out, matcher.matched) == ("ab", "<STOP>")


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert matcher.feed("one\n") == "one"
    assert matcher.feed("two\n") == "\ntwo"
    assert matcher.feed("\nUs") == ""
    assert matcher.feed("ual") == "\n\nUsual"
    assert matcher.flush() == ""


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(("x",))
    assert matcher.feed("axb") == "a"
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


def state(tokenizer: Tokenizer | None, *, stream: bool = True, **sampling: object) -> OutputState:
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=[5, 6, 7],
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        stream=stream,
    )
    return OutputState(request, tokenizer, arrival=10.0)


def run(
    output: OutputState, ids: list[int], reason: FinishReason = FinishReason.LENGTH
) -> list[RequestOutput]:
    """All outputs of tokens that come one a step."""
    outputs = []
    for step, token_id in enumerate(ids):
        if output.add_token(token_id, None, 11.0 + step):
            reason = FinishReason.STOP
            break
        outputs.append(output.take())
    output.finish(reason)
    outputs.append(output.take(num_cached=2, first_scheduled=10.5))
    return [o for o in outputs if o is not None]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


@given(
    ids=st.lists(st.integers(0, 49151), min_size=1, max_size=12),
    at=st.integers(0, 40),
    length=st.integers(1, 5),
    include=st.booleans(),
)
def test_outputs_add_up_to_the_decoded_text_cut_at_the_stop(
    tokenizer: Tokenizer, ids: list[int], at: int, length: int, include: bool
) -> None:
    whole = tokenizer.decode(ids)
    stop = whole[at : at + length] or "absent"
    outputs = run(state(tokenizer, stop=(stop,), include_stop=include, max_tokens=99), ids)
    assert text_of(outputs) == cut(whole, (stop,), include)
    assert (outputs[-1].stop_reason == stop) == (stop in whole)


@pytest.mark.parametrize("word", ["👩‍👩‍👧‍👦", "東京", "e\u0301", "한국"])
def test_a_character_over_many_tokens_comes_out_whole(tokenizer: Tokenizer, word: str) -> None:
    outputs = run(state(tokenizer), tokenizer.encode(word))
    assert text_of(outputs) == word
    assert not any("\ufffd" in output.text for output in outputs)


def test_an_unfinished_character_ends_as_a_mark(tokenizer: Tokenizer) -> None:
    outputs = run(state(tokenizer), tokenizer.encode("é👩")[:-1])
    assert text_of(outputs).startswith("é\ufffd")


def test_every_token_is_in_exactly_one_output_with_its_logprob(tokenizer: Tokenizer) -> None:
    output = state(tokenizer, logprobs=1, stop=("never found",))
    ids = tokenizer.encode("never fo und 👩!")
    outputs = []
    for token_id in ids:
        output.add_token(token_id, TokenLogprob(token_id, -1.0, 1, []), 1.0)
        outputs.append(output.take())
    output.finish(FinishReason.LENGTH)
    outputs.append(output.take())
    assert [i for o in outputs for i in o.token_ids] == ids
    for o in outputs:
        assert [entry.token_id for entry in o.logprobs] == o.token_ids
    assert text_of(outputs) == "never fo und 👩!"


def test_the_final_output_alone_has_usage_times_and_reason(tokenizer: Tokenizer) -> None:
    *deltas, last = run(state(tokenizer), tokenizer.encode("one two three"))
    assert all(o.usage is None and o.times is None and o.finish_reason is None for o in deltas)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.cached_tokens) == (3, 2)
    assert last.usage.completion_tokens == len(tokenizer.encode("one two three"))
    assert last.times is not None
    assert (last.times.arrival, last.times.first_scheduled) == (10.0, 10.5)
    assert (last.times.first_token, last.times.last_token) == (11.0, 13.0)


def test_without_streaming_there_is_one_output_with_everything(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")
    (only,) = run(state(tokenizer, stream=False), ids)
    assert (only.text, only.token_ids) == ("one two three", ids)
    assert only.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("include", "text"), [(False, "Hi"), (True, "Hi there")])
def test_the_token_that_ended_a_request_is_text_only_where_asked_for(
    tokenizer: Tokenizer, include: bool, text: str
) -> None:
    hi, there = tokenizer.encode("Hi there")
    output = state(tokenizer, stop_token_ids=(there,), include_stop=include)
    output.add_token(hi, None, 1.0)
    output.add_token(there, None, 2.0, ends=True)
    output.finish(FinishReason.STOP, stop_reason=there)
    final = output.take()
    assert final is not None
    assert (final.text, final.stop_reason, final.token_ids) == (text, there, [hi, there])


def test_special_tokens_are_text_only_where_asked_for(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("Hi")]
    assert text_of(run(state(tokenizer), ids)) == "Hi"
    assert text_of(run(state(tokenizer, skip_special_tokens=False), ids)) == "<|im_start|>Hi"


def test_no_stop_string_ends_a_request_before_its_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("stop stop stop")
    early = run(state(tokenizer, stop=("stop",), min_tokens=2, max_tokens=9), ids)
    assert text_of(early) == "stop stop "
    assert early[-1].stop_reason == "stop"


def test_prompt_logprobs_come_once_and_whole(tokenizer: Tokenizer) -> None:
    output = state(tokenizer, prompt_logprobs=0)
    entries = [TokenLogprob(i, -1.0, 1, []) for i in (6, 7)]
    output.add_prompt_logprobs(1, entries[:1])
    assert output.take() is None
    output.add_prompt_logprobs(2, entries[1:])
    output.add_token(9, None, 1.0)
    first = output.take()
    assert first is not None
    assert first.prompt_logprobs == [None, *entries]
    output.finish(FinishReason.LENGTH)
    final = output.take()
    assert final is not None
    assert final.prompt_logprobs is None


def test_an_error_ends_with_its_message_and_without_what_was_held(tokenizer: Tokenizer) -> None:
    output = state(tokenizer, stop=("there is",))
    for token_id in tokenizer.encode("so there"):
        output.add_token(token_id, None, 1.0)
    output.finish(FinishReason.ERROR, error="broken")
    final = output.take()
    assert final is not None
    assert (final.text, final.error) == ("so ", "broken")


def test_without_a_tokenizer_tokens_pass_and_there_is_no_text() -> None:
    outputs = run(state(None, stop=("x",)), [3, 4])
    assert text_of(outputs) == ""
    assert [i for o in outputs for i in o.token_ids] == [3, 4]
