#!/usr/bin/env python3
"""Ask every query of the dashboard of a real Prometheus that scrapes a running server.

    docker/check-dashboard.py [http://127.0.0.1:8000]

Starts a Prometheus of its own (Debian's package prometheus) on a free port of this machine, has the
server answer a few requests meanwhile, and fails where a query has an error or no number.
``NSA_SERVE_API_KEY`` is the server's key, if it asks for one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "nsa-serve.json"
INTERVAL = 1  # seconds between two scrapes
RATE_INTERVAL = "5m"  # what Grafana would put in place of $__rate_interval
NUM_REQUESTS = 6
PATIENCE = 60.0  # seconds for the last scrape to arrive


def queries() -> Iterator[tuple[str, str]]:
    """(panel, query) of the whole dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", RATE_INTERVAL)


def ask_server(url: str, number: int) -> None:
    """One short answer; every second prompt is a few pages long, and known after the first."""
    words = "The quick brown fox jumps over the lazy dog. " * (1 + 20 * (number % 2))
    body = {"prompt": words, "max_tokens": 8, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", **_authorization()}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        response.read()


def _authorization() -> dict[str, str]:
    key = os.environ.get("NSA_SERVE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def start_prometheus(folder: Path, server: str, port: int) -> subprocess.Popen[bytes]:
    """A Prometheus that scrapes ``server`` and keeps its data below ``folder``."""
    job: dict[str, Any] = {
        "job_name": "nsa-serve",
        "static_configs": [{"targets": [urllib.parse.urlsplit(server).netloc]}],
    }
    key = os.environ.get("NSA_SERVE_API_KEY")
    if key:
        job["authorization"] = {"credentials": key}
    settings = {"global": {"scrape_interval": f"{INTERVAL}s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    return subprocess.Popen(command)


def evaluate(port: int, query: str) -> list[float]:
    """The numbers that a query gives now. Raises ``ValueError`` with Prometheus' own words."""
    asked = urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{asked}") as response:
            found = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]) from None
    return [float(series["value"][1]) for series in found]


def await_counted(port: int, wanted: int) -> None:
    """Wait until Prometheus has seen that many requests answered, and twice the idle server."""
    deadline = time.monotonic() + PATIENCE
    query = "sum(nsa_serve:request_success_total)"
    while time.monotonic() < deadline:
        try:
            if sum(evaluate(port, query)) >= wanted:
                time.sleep(2 * INTERVAL)
                return
        except (OSError, ValueError):
            pass  # it starts
        time.sleep(INTERVAL)
    sys.exit(f"FAILED: Prometheus saw no {wanted} answered requests within {PATIENCE:g} s")


def check(port: int) -> int:
    """Print every query with its numbers. Returns how many had none."""
    failures = 0
    for panel, query in queries():
        try:
            numbers = [n for n in evaluate(port, query) if not math.isnan(n)]
            shown = ", ".join(f"{number:.4g}" for number in numbers) or "NO NUMBER"
        except ValueError as error:
            numbers, shown = [], f"ERROR {error}"
        failures += not numbers
        print(f"{panel:24} {shown:32} {query}")
    return failures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("server", nargs="?", default="http://127.0.0.1:8000")
    server = arguments.parse_args().server.rstrip("/")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        prometheus = start_prometheus(Path(folder), server, port)
        try:
            for number in range(NUM_REQUESTS):
                time.sleep(INTERVAL)  # so that counters are seen to grow
                ask_server(server, number)
            await_counted(port, NUM_REQUESTS)
            failures = check(port)
        finally:
            prometheus.terminate()
            prometheus.wait()
    if failures:
        sys.exit(f"FAILED: {failures} queries without a number")
    print("Every query of the dashboard has its numbers.")


if __name__ == "__main__":
    main()
