"""Fields of a body that nobody knows: ignored, as clients expect, and told of in the log."""

from __future__ import annotations

import asyncio

import pytest

from nsa_serve.server.body import MAX_NAME_CHARS, MAX_NAMES, UnknownNames
from tests.server_fakes import fake_server

HI = [{"role": "user", "content": "hi"}]
BODIES = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [65]},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_field_that_nobody_knows_is_ignored_and_told_of_once_without_its_value(path, caplog):
    async def scenario():
        async with fake_server() as server:
            for value in ("secret", ["secret"]):
                answer = await server.post(path, {**BODIES[path], "max_tokns": value})
                assert answer.status_code == 200

    asyncio.run(scenario())
    (record,) = caplog.records
    assert "field 'max_tokns', which nobody here knows" in record.getMessage()
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"},
        {"best_of": 1, "frobnicate": None, "temperature": 0, "top_k": 3},
    ],
    ids=["for OpenAI's own service", "asking for nothing, or known"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_what_changes_no_answer_is_not_told_of(path, fields, caplog):
    async def scenario():
        async with fake_server() as server:
            assert (await server.post(path, {**BODIES[path], **fields})).status_code == 200

    asyncio.run(scenario())
    assert not caplog.records


def test_a_fields_name_can_not_fill_the_log_or_forge_a_line(caplog):
    UnknownNames().tell(["x" * 10_000, "a\nERROR forged"])
    long, forged = (record.getMessage() for record in caplog.records)
    assert "x" * MAX_NAME_CHARS in long
    assert "x" * (MAX_NAME_CHARS + 1) not in long
    assert "\n" not in forged


def test_ever_new_names_are_told_of_up_to_a_bound(caplog):
    names = UnknownNames()
    for start in range(0, 3 * MAX_NAMES, 7):
        names.tell([f"field{i}" for i in range(start, start + 7)])
    assert len(caplog.records) == MAX_NAMES + 1
    assert "further fields" in caplog.records[-1].getMessage()
