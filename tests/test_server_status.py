"""``/status`` and ``/traces``: right numbers, bounded maps, and traces for who asked alone."""

from __future__ import annotations

import asyncio
import base64
import struct
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_serve.engine.messages import EngineDescription
from nsa_serve.errors import TraceNotFound
from nsa_serve.request import EngineRequest, RequestOutput, RequestTimes, SamplingParams, TokenTrace
from nsa_serve.server.recent import MAX_TIMES, MAX_TRACES, Recent
from nsa_serve.server.status import MAX_CELLS, cells_of
from nsa_serve.stats import CacheMap, TierReport
from tests.server_fakes import events, fake_server


def description(**changes):
    fields = {
        "model_name": "fake", "family": "llama", "attention": "nsa", "trained_sparse": False,
        "dtype": "bfloat16", "device": "cpu", "num_layers": 1, "vocab_size": 258,
        "max_model_len": 1000, "page_size": 8, "num_blocks": 8, "token_budget": 64,
        "bos_token_id": None, "eos_token_ids": (), "generation_config": {}, "tokenizer": None,
    }  # fmt: skip
    return EngineDescription(**{**fields, **changes})


def scenario(act, **settings):
    async def run():
        settings.setdefault("engine", description())
        async with fake_server(**settings) as server:
            return await act(server)

    return asyncio.run(run())


def test_status_tells_what_is_loaded_and_how_busy_it_is():
    async def act(server):
        return (await server.client.get("/status")).json()

    body = scenario(act)
    assert body["model"] == "fake"
    assert body["state"] == "ok"
    assert body["engine"] == {
        "family": "llama", "attention": "nsa", "trained_sparse": False, "dtype": "bfloat16",
        "device": "cpu", "num_layers": 1, "page_size": 8, "token_budget": 64,
    }  # fmt: skip
    assert (body["requests"]["running"], body["requests"]["waiting"]) == (1, 2)
    assert body["requests"]["finished"]["stop"] == 3
    assert body["tokens"]["generated"] == 7
    assert body["cache"] == {
        "blocks": 8, "in_use": 2, "kept": 1, "shared": 1, "spilled": 1,
        "prefix_queries": 10, "prefix_hits": 4,
    }  # fmt: skip
    assert body["cells"] == {"blocks_per_cell": 1, "states": "suk-----", "places": "dhdddddd"}


def test_status_tells_what_the_host_tier_has_cost_where_there_is_one():
    async def act(server):
        without = (await server.client.get("/status")).json()["host_tier"]
        server.engine.tier = TierReport(lookups=10, hits=9, fetched_bytes=4096, stall_seconds=0.5)
        return without, (await server.client.get("/status")).json()["host_tier"]

    assert scenario(act) == (
        None,
        {
            "lookups": 10, "hits": 9, "fetched_bytes": 4096, "out_bytes": 0, "in_bytes": 0,
            "stall_seconds": 0.5,
        },
    )  # fmt: skip


def test_status_shows_the_first_tokens_of_requests_that_ended():
    async def act(server):
        await server.chat(stream=True)
        return (await server.client.get("/status")).json()["first_tokens"]

    (first,) = scenario(act)
    assert first["seconds"] == 1.0
    assert first["age"] > 0


def test_a_draining_server_says_so():
    async def act(server):
        server.services.admission.draining = True
        return (await server.client.get("/status")).json()["state"]

    assert scenario(act) == "draining"


@given(st.lists(st.integers(0, 255), min_size=1, max_size=3 * MAX_CELLS + 1))
def test_a_cell_shows_what_most_of_its_blocks_are(holders):
    cells = cells_of(CacheMap(bytes(holders), []))
    width = cells.blocks_per_cell
    assert len(cells.states) == len(cells.places) == -(-len(holders) // width) <= MAX_CELLS
    letters = {0: "-", 1: "u", 255: "k"}
    for at, shown in enumerate(cells.states):
        counts = Counter(letters.get(c, "s") for c in holders[at * width : (at + 1) * width])
        assert counts[shown] == max(counts.values())


def test_a_trace_can_be_had_by_the_id_of_the_answer():
    async def act(server):
        reply = (await server.chat("Hello NSA", nsa_trace=True, max_tokens=4)).json()
        return reply, (await server.client.get(f"/traces/{reply['id']}")).json()

    reply, trace = scenario(act)
    prompt = "<user>Hello NSA<assistant>"
    assert trace["id"] == reply["id"]
    assert trace["num_prompt_tokens"] == len(prompt)
    assert (trace["layers"], trace["kv_heads"], trace["selected"]) == (1, 1, 2)
    assert [token["text"] for token in trace["tokens"]][:2] == ["H", "i"]
    assert [token["position"] for token in trace["tokens"]] == [25, 26, 27, 28]
    text = prompt + "Hi " + "\ufffd"  # four bytes of the answer, the last one half a letter
    assert trace["blocks"] == [text[at : at + 8] for at in range(0, len(text), 8)]
    numbers = struct.unpack("<8i", base64.b64decode(trace["selection"]))
    assert numbers == (0, 0, 0, 1, 0, 2, 0, 3)
    gates = struct.unpack("<12f", base64.b64decode(trace["gates"]))
    assert gates == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3])


def test_fixed_gates_are_told_by_their_absence():
    async def act(server):
        server.engine.gated = False
        reply = (await server.complete(nsa_trace=True)).json()
        return (await server.client.get(f"/traces/{reply['id']}")).json()

    assert scenario(act)["gates"] is None


def test_each_choice_of_a_stream_has_its_trace():
    async def act(server):
        response = await server.complete(nsa_trace=True, n=2, stream=True)
        name = events(response)[0]["id"]
        paths = [f"/traces/{name}?choice={choice}" for choice in (0, 1, 2)]
        return [(await server.client.get(path)).status_code for path in paths]

    assert scenario(act) == [200, 200, 404]


def test_nothing_is_kept_for_those_who_did_not_ask():
    async def act(server):
        reply = (await server.chat()).json()
        assert not server.engine.requests[0].sampling.trace
        return await server.client.get(f"/traces/{reply['id']}")

    response = scenario(act)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "trace_not_found"


def test_a_dense_model_refuses_a_trace_by_name():
    async def act(server):
        return await server.chat(nsa_trace=True)

    response = scenario(act, engine=description(attention="dense"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "nsa_trace"


def test_traces_and_times_are_bounded_and_the_oldest_go_first():
    recent = Recent()
    for number in range(MAX_TIMES + 20):
        request = EngineRequest(
            request_id=f"r{number}", prompt_token_ids=[1], sampling=SamplingParams()
        )
        output = RequestOutput(
            request_id=request.request_id,
            times=RequestTimes(0.0, 0.0, float(number), float(number)),
            trace=[TokenTrace(0, (1, 1, 1), b"\0" * 4, None, 5)],
        )
        recent.observe(request, output)
    assert len(list(recent.first_tokens(0.0))) == MAX_TIMES
    last = MAX_TIMES + 19
    assert recent.trace(f"r{last - MAX_TRACES + 1}").token_ids == [1, 5]
    with pytest.raises(TraceNotFound):
        recent.trace(f"r{last - MAX_TRACES}")


def test_a_kept_prompt_takes_a_machine_word_a_token():
    recent = Recent()
    request = EngineRequest(
        request_id="r", prompt_token_ids=list(range(10_000)), sampling=SamplingParams()
    )
    piece = TokenTrace(0, (1, 1, 1), b"\0" * 4, None, 5)
    recent.observe(request, RequestOutput(request_id="r", trace=[piece]))
    assert sys.getsizeof(recent.trace("r").prompt_token_ids) < 5 * 10_000


def test_status_and_traces_are_described():
    async def act(server):
        return (await server.client.get("/openapi.json")).json()

    document = scenario(act)
    assert "/status" in document["paths"]
    assert "/traces/{id}" in document["paths"]
    assert "/" not in document["paths"]
    schemas = document["components"]["schemas"]
    assert "nsa_trace" in schemas["ChatCompletionRequest"]["properties"]
    assert "selection" in schemas["Trace"]["properties"]
