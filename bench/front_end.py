"""What the HTTP server costs over the engine in process: the same requests through both."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from ..llm import LLM
from ..request import SamplingParams
from .load.http import HTTPClient, reason_of
from .measure import Timing, summarise

NUM_STREAMS = 8
NUM_TOKENS = 64
STARTUP_SECONDS = 300
PROMPT = "Once upon a time, in the reign of a king who loved long letters,"


def prompts(salt: int) -> list[str]:
    """Eight prompts that share no page with those of another ``salt``."""
    return [f"Letter {salt}.{i}. {PROMPT * 8}" for i in range(NUM_STREAMS)]


@contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """A server process of the embedded model on a free port; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nsa_serve.server.cli", "serve", "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"no server at {url} within {STARTUP_SECONDS} s")


async def _stream(client: HTTPClient, model: str, prompt: str) -> int:
    """Chunks of one answer."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    pieces: list[bytes] = []
    reply = await client.exchange(
        "POST", "/v1/completions", body, on_piece=lambda piece, _: pieces.append(piece)
    )
    if reply.status != 200:
        raise AssertionError(f"the server answered {reply.status}: {reason_of(reply)}")
    return b"".join(pieces).count(b"data: {")


async def _through_http(url: str, salt: int) -> float:
    """Milliseconds until all streams have ended.

    By the load test's own client: a general one takes more of the CPU that both share than the
    server does.
    """
    client = HTTPClient(url, {}, clock=time.perf_counter)
    model = (await client.exchange("GET", "/v1/models")).json()["data"][0]["id"]
    start = time.perf_counter()
    counts = await asyncio.gather(*(_stream(client, model, p) for p in prompts(salt)))
    elapsed = 1e3 * (time.perf_counter() - start)
    client.close()
    if min(counts) < NUM_TOKENS // 2:
        raise AssertionError(f"streams ended early: {counts} chunks of {NUM_TOKENS} tokens")
    return elapsed


def _in_process(llm: LLM, salt: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts(salt), sampling)
    return 1e3 * (time.perf_counter() - start)


def server_overhead(dtype: str, rounds: int = 4) -> tuple[Timing, Timing]:
    """Milliseconds of eight streams (through HTTP, in process), measured in turn."""
    llm = LLM(dtype=dtype, attention="nsa", device="cpu", kv_cache_memory_bytes=1 << 30)
    http, direct = [], []
    flags = ("--dtype", dtype, "--attention", "nsa", "--device", "cpu")
    with running_server(*flags, "--kv-cache-memory-bytes", str(1 << 30)) as url:
        for salt in range(rounds + 1):
            http.append(asyncio.run(_through_http(url, salt)))
            direct.append(_in_process(llm, salt))
    return summarise(http[1:], 1), summarise(direct[1:], 1)
