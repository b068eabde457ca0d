"""The routes beside completions: models, probes, tokens, metrics, the API's description."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nsa_serve import __version__
from nsa_serve.server.stats_line import is_busy, stats_line
from nsa_serve.stats import EngineStats
from tests.server_fakes import FakeEngine, fake_server


def get(path, *, change=None, headers=None, **server_settings):
    async def scenario():
        async with fake_server(**server_settings) as server:
            if change:
                change(server.engine)
            return await server.client.get(path, headers=headers)

    return asyncio.run(scenario())


def post(path, body):
    async def scenario():
        async with fake_server() as server:
            return (await server.post(path, body)).json()

    return asyncio.run(scenario())


def test_models_lists_every_name():
    body = get("/v1/models", model_names=("a", "org/b")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["a", "org/b"]
    assert body["data"][0]["max_model_len"] == 1000


def test_one_model_is_found_by_a_name_with_a_slash():
    assert get("/v1/models/org/b", model_names=("org/b",)).json()["id"] == "org/b"


def test_version_is_the_packages():
    assert get("/version").json() == {"version": __version__}


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize(("state", "status"), [(None, 200), ("frozen", 503), ("dead", 503)])
def test_probes_ask_the_engine(path, state, status):
    def change(engine):
        if state:
            setattr(engine, state, True)

    response = get(path, change=change)
    assert response.status_code == status
    assert response.json() == {"status": state or "ok"}


def test_health_needs_no_key_and_the_rest_does():
    paths = ["/health", "/ready", "/metrics", "/v1/models", "/version", "/openapi.json"]
    found = {path: get(path, api_keys=("k",)).status_code for path in paths}
    assert found == {path: 200 if path == "/health" else 401 for path in paths}


def test_tokens_go_there_and_back():
    body = post("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert body["tokens"] == [256, 104, 195, 169]
    assert (body["count"], body["max_model_len"]) == (4, 1000)
    assert body["token_strs"] == ["", "h", "\ufffd", "\ufffd"]
    assert post("/detokenize", {"tokens": body["tokens"]}) == {"prompt": "hé"}


def test_a_conversation_is_tokenized_as_it_would_be_asked():
    message = [{"role": "user", "content": "a"}]
    assert bytes(post("/tokenize", {"messages": message})["tokens"]) == b"<user>a<assistant>"
    body = {"messages": message, "add_generation_prompt": False}
    assert bytes(post("/tokenize", body)["tokens"]) == b"<user>a"


def _families(page):
    return {family.name: family for family in text_string_to_metric_families(page)}


def _scrape(**settings):
    async def scenario():
        async with fake_server(**settings) as server:
            await server.chat(stream=True)
            await server.complete()
            return (await server.client.get("/metrics")).text

    return _families(asyncio.run(scenario()))


def test_counters_and_gauges_are_the_engines():
    families = _scrape()
    value = {name: family.samples[0].value for name, family in families.items()}
    assert value["nsa_serve:num_requests_running"] == 1
    assert value["nsa_serve:num_requests_waiting"] == 2
    assert value["nsa_serve:kv_cache_usage_perc"] == 0.25
    assert value["nsa_serve:prefix_cache_hits"] == 4
    assert value["nsa_serve:generation_tokens"] == 7
    assert value["nsa_serve:request_aborted"] == 2
    assert families["nsa_serve:generation_tokens"].samples[0].name.endswith("_total")
    reasons = {
        sample.labels["finished_reason"]: sample.value
        for sample in families["nsa_serve:request_success"].samples
    }
    assert reasons == {"stop": 3, "length": 0, "tool_calls": 0}


@pytest.mark.parametrize(
    ("name", "total", "count"),
    [
        ("time_to_first_token_seconds", 2.0, 2),
        ("request_queue_time_seconds", 0.5, 2),
        ("request_prefill_time_seconds", 1.5, 2),
        ("request_decode_time_seconds", 3.0, 2),
        ("e2e_request_latency_seconds", 5.0, 2),
        ("request_time_per_output_token_seconds", 0.6, 2),
        ("request_generation_tokens", 12, 2),
        ("request_prompt_tokens", 28, 2),
        ("iteration_tokens_total", 5, 1),
    ],
)
def test_histograms_come_from_the_times_of_requests(name, total, count):
    samples = {s.name: s.value for s in _scrape()[f"nsa_serve:{name}"].samples}
    assert samples[f"nsa_serve:{name}_sum"] == pytest.approx(total)
    assert samples[f"nsa_serve:{name}_count"] == count


def test_gaps_between_streamed_tokens_are_counted():
    samples = {s.name: s.value for s in _scrape()["nsa_serve:inter_token_latency_seconds"].samples}
    assert samples["nsa_serve:inter_token_latency_seconds_count"] == 5


def test_the_prefix_can_be_vllms():
    families = _scrape(metrics_prefix="vllm")
    assert "vllm:num_requests_running" in families
    assert families["vllm:num_requests_running"].samples[0].labels == {"model_name": "fake"}
    assert not any(name.startswith("nsa_serve") for name in families)


def test_origins_are_refused_unless_named():
    headers = {"origin": "http://page"}
    closed = get("/version", headers=headers)
    opened = get("/version", headers=headers, allowed_origins=("http://page",))
    assert "access-control-allow-origin" not in closed.headers
    assert opened.headers["access-control-allow-origin"] == "http://page"


def test_a_preflight_needs_no_key():
    async def scenario():
        async with fake_server(api_keys=("k",), allowed_origins=("http://page",)) as server:
            headers = {"origin": "http://page", "access-control-request-method": "POST"}
            return await server.client.options("/v1/chat/completions", headers=headers)

    assert asyncio.run(scenario()).status_code == 200


def test_the_description_has_every_route_and_resolves():
    document = get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/CompletionRequest")
    assert _references(document) <= {f"#/components/schemas/{name}" for name in schemas}


def _references(node):
    if isinstance(node, list):
        return set().union(*map(_references, node), set())
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(_references, node.values()), set())
    return set()


def test_the_line_of_statistics_tells_of_the_last_seconds():
    before = asyncio.run(FakeEngine().stats())
    counters = EngineStats(
        num_steps=9, prompt_tokens=50, generation_tokens=107, prefix_queries=100, prefix_hits=25
    )
    now = counters.snapshot(
        num_running=3, num_waiting=1, num_blocks=8, num_blocks_in_use=6, num_blocks_cached=0
    )
    assert is_busy(before, now)
    assert stats_line(before, now, 10.0) == (
        "running 3, waiting 1 · prompt 5.0 tokens/s, generation 10.0 tokens/s · "
        "cache in use 75.0%, prefix hits 25.0%"
    )


@pytest.mark.parametrize(
    ("counted", "gauges", "line"),
    [
        ({"generation_tokens": 107}, {"num_running": 3}, "running 3 · generation 10.0 tokens/s"),
        ({"prompt_tokens": 3}, {"num_waiting": 1}, "waiting 1 · prompt 0.3 tokens/s"),
        ({}, {"num_blocks_in_use": 1}, "cache in use 12.5%"),
        (
            {},
            {"num_running": 1, "num_prefill_tokens": 28672, "oldest_prefill": 0.3},
            "running 1 · left in prefill 28,672, oldest 30% done",
        ),
        (
            {},
            {"num_waiting": 2, "num_queued_tokens": 4100},
            "waiting 2 · prompt tokens waiting 4,100",
        ),
        ({}, {}, "running 0"),
    ],
)
def test_what_is_0_is_not_in_the_line_of_statistics(counted, gauges, line):
    before = EngineStats(generation_tokens=7).snapshot(
        num_running=0, num_waiting=0, num_blocks=8, num_blocks_in_use=0, num_blocks_cached=0
    )
    quiet = {"num_running": 0, "num_waiting": 0, "num_blocks_in_use": 0}
    now = EngineStats(**{"generation_tokens": 7, **counted}).snapshot(
        **{**quiet, **gauges}, num_blocks=8, num_blocks_cached=0
    )
    assert stats_line(before, now, 10.0) == line


def test_an_idle_engine_is_not_told_of():
    idle = EngineStats(num_steps=9).snapshot(
        num_running=0, num_waiting=0, num_blocks=8, num_blocks_in_use=0, num_blocks_cached=3
    )
    assert not is_busy(idle, idle)
