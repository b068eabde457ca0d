"""The images' recipe, the composition around them and the dashboard: complete, pinned, and true."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server_fakes import fake_server

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "nsa-serve.json").read_text())
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
RECIPE = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exposed() -> dict[str, set[str]]:
    """Labels by the name of every sample that /metrics has after one answer."""

    async def scenario():
        async with fake_server() as server:
            await server.chat(stream=True)
            return (await server.client.get("/metrics")).text

    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(asyncio.run(scenario())):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_of_the_dashboard_names_metrics_and_labels_that_are_exposed():
    samples = exposed()
    for query in QUERIES:
        names = re.findall(r"nsa_serve:\w+", query)
        assert names
        assert set(names) <= set(samples)
        for grouping in re.findall(r"by \((\w+)\)", query):
            assert all(grouping in samples[name] for name in names)


def test_a_legend_names_labels_that_its_query_keeps():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            kept = re.findall(r"by \((\w+)\)", target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(kept)


def test_the_dashboard_shows_what_a_server_is_judged_by():
    asked = " ".join(QUERIES)
    for wanted in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "generation_tokens_total",
        "num_requests_waiting", "kv_cache_blocks_resident", "prefix_cache_hits_total",
        "kv_host_hits_total", "kv_host_fetched_bytes_total",
        "num_preemptions_total", "request_errored_total", "request_rejected_total",
    ):  # fmt: skip
        assert f"nsa_serve:{wanted}" in asked


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_everything_that_the_composition_mounts_is_there():
    mounts = [
        volume.split(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service.get("volumes", [])
    ]
    for mount in mounts:
        assert mount in COMPOSE["volumes"] or (DOCKER / mount).exists()
    source = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}


def test_the_composition_is_pinned_and_reaches_no_further_than_this_machine():
    for name, service in COMPOSE["services"].items():
        if name != "server":
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (target,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0][
        "static_configs"
    ][0]["targets"]
    assert target == "server:8000"
    assert COMPOSE["services"]["server"]["read_only"] is True


def test_both_images_run_as_nobody_under_an_init_and_are_watched():
    for stage in ("cpu", "gpu"):
        assert re.search(rf"^FROM runtime AS {stage}$", RECIPE, re.M)
    runtime = RECIPE.split(" AS runtime\n")[1]
    assert re.findall(r"^USER (\S+)$", runtime, re.M)[-1] == "10001:10001"
    assert 'ENTRYPOINT ["tini", "--", "nsa-serve"]' in runtime
    assert re.search(r'^HEALTHCHECK .*CMD \["healthcheck"\]$', runtime, re.M)
    assert not re.search(r"\b(curl|wget)\b", RECIPE)


def test_the_recipe_builds_on_any_base_and_pins_what_it_installs():
    bases = re.findall(r"^FROM (\S+)", RECIPE, re.M)
    assert set(bases) <= {"${BASE_IMAGE}", "builder", "runtime"}
    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", RECIPE, re.M)
    assert default is not None
    assert re.search(r":\d+\.\d+\.\d+", default[1])
    assert all("==" in line for line in re.findall(r"^ARG TORCH_\w+=.*$", RECIPE, re.M))
    installs = re.findall(r"pip install (.*?)(?: \\)?$", RECIPE, re.M)
    assert installs
    assert all("-c docker/constraints.txt" in line or "==" in line for line in installs)


def test_every_dependency_of_the_package_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {_normal(name): version for name, version in pins.items()}
    needed = [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    for line in needed:
        name = _normal(re.split(r"[<>=!;~ ]", line)[0])
        if name == "torch":
            continue  # the Dockerfile pins it, by target
        assert name in pinned, f"{name} is not pinned"
        low = re.search(r">=([\d.]+)", line)
        high = re.search(r"<([\d.]+)", line)
        assert low is None or _version(pinned[name]) >= _version(low[1])
        assert high is None or _version(pinned[name]) < _version(high[1])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("b")[0]))


def test_only_what_the_images_need_is_sent_to_the_build():
    kept = [
        line[1:]
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert all((ROOT / name).exists() for name in kept)
    copied = set(re.findall(r"^COPY (?:--chmod=\d+ )?(docker/\S+)", RECIPE, re.M))
    assert copied <= set(kept)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on a free port that answers every request with ``status``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check_health(port: int) -> int:
    return subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py"],
        env={"NSA_SERVE_PORT": str(port)},
        check=False,
        capture_output=True,
    ).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1)])
def test_the_health_check_is_the_servers_answer(status, code):
    with answering(status) as port:
        assert check_health(port) == code


def test_a_server_that_is_gone_is_not_healthy():
    with answering(200) as port:
        pass
    assert check_health(port) == 1


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_can_be_read_by_the_shell_and_stop_at_the_first_failure(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
