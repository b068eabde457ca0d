"""Hostile clients and ends of processes, against a whole server: nothing is lost, all goes on.

The engine is the real one without a model. Faults inside a step are in test_engine_faults.py,
a killed engine and a second signal in test_server_process.py, frozen ones in test_watchdog.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nsa_serve.server import serve as serve_room
from nsa_serve.server.flags import ServeFlags
from nsa_serve.server.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS
from tests.server_process import running

MODEL = "smollm2-135m-instruct"
FAST = ("--mock-engine", "5000", "--max-num-seqs", "64", "--max-num-queued-reqs", "20000")
DEADLINE = 60.0
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server():
    with running(*FAST, "--served-model-name", MODEL) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        yield client


@pytest.fixture
def http(client):
    """A client; and after every fault: idle, no block held, and the next request is answered."""
    yield client
    until(lambda: gauges(client)["num_requests_running"] == 0)
    assert gauges(client)["num_requests_waiting"] == 0
    assert gauges(client)["kv_cache_usage_perc"] == 0
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert client.get("/health").status_code == 200


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came"


def gauges(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {f.name.removeprefix("nsa_serve:"): f.samples[0].value for f in families if f.samples}


def connect(server, receive_buffer=None):
    """A connection at the level of bytes."""
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(DEADLINE)
    client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return client


def post_bytes(path, body):
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


def read_all(client):
    """What the server sends until it closes; a reset counts as a close."""
    data = b""
    try:
        while piece := client.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def resident(server):
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


def test_a_reader_that_stops_reading_holds_up_nobody_and_loses_nothing(server, http):
    body = {
        "prompt": "a", "max_tokens": 6000, "stream": True, "logprobs": 1,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    with connect(server, receive_buffer=4096) as slow:
        made = gauges(http)["generation_tokens"]
        before = resident(server)
        slow.sendall(post_bytes("/v1/completions", body))
        # The engine makes all of its tokens meanwhile, and others are answered.
        others = 0
        while gauges(http)["generation_tokens"] < made + 6000 + others:
            reply = http.post("/v1/completions", json={"prompt": "b"})
            others += reply.json()["usage"]["completion_tokens"]
        assert resident(server) - before < 64 << 20
        text = read_all(slow).decode()
    assert '"completion_tokens":6000' in text
    assert text.rstrip("\r\n0").endswith("data: [DONE]")


def test_a_client_that_reads_nothing_for_long_is_cut(monkeypatch):
    """By the kernel, which needs a client whose window stays shut."""
    monkeypatch.setattr(serve_room, "_STALL_MS", 500)
    with serve_room._bind(ServeFlags(port=0)) as listener, socket.socket() as slow:
        listener.listen()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while accepted.send(bytes(1 << 16)):
                    pass
            poll = select.poll()
            poll.register(accepted, 0)  # errors alone
            assert poll.poll(1000 * DEADLINE), "the connection was never cut"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_midst_of_an_answer_frees_its_blocks(server, http, stream):
    aborted = gauges(http)["request_aborted"]
    # More tokens than come until the test is over.
    body = {"prompt": "a", "max_tokens": 8000, "stream": stream, "n": 4}
    with connect(server) as client:
        client.sendall(post_bytes("/v1/completions", body))
        until(lambda: gauges(http)["kv_cache_usage_perc"] > 0)
    until(lambda: gauges(http)["request_aborted"] == aborted + 4)
    assert gauges(http)["kv_cache_usage_perc"] == 0


FLOODS = {
    "many headers": b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    "large headers": b"GET /health HTTP/1.1\r\n" + (b"a: " + b"b" * 9000 + b"\r\n") * 8 + b"\r\n",
    "a header without an end": b"GET /health HTTP/1.1\r\na: " + b"b" * (4 << 20),
    "a path without an end": b"GET /" + b"b" * (4 << 20),
    "a large path": b"GET /" + b"b" * (MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_headers_is_refused_and_the_connection_closed(server, http, flood):
    with connect(server) as client:
        # The server may close before it has been sent everything.
        try:
            client.sendall(FLOODS[flood])
        except (BrokenPipeError, ConnectionResetError):
            return
        answer = read_all(client)
    if answer:
        assert answer.startswith(b"HTTP/1.1 431 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}


def test_a_head_within_the_limits_is_taken(http):
    headers = {f"h{i}": "x" * 500 for i in range(MAX_HEADERS - 8)}
    assert http.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 2000])
def test_what_is_not_http_is_refused_in_the_form_of_all_errors(server, http, noise):
    with connect(server) as client:
        client.sendall(noise)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


SMALL_BOMBS = {
    "a list of wrong things": b'{"messages":[' + b"1," * 2000 + b"1]}",
    "a deep list": b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "a deep object": b'{"a":' * 680 + b"1" + b"}" * 680,
    "one long wrong value": b'{"messages":[],"temperature":"' + b"\\u0000" * 660 + b'"}',
    "long names": b'{"' + b"k" * 4000 + b'":1}',
    "wrong items of a list": b'{"messages":[{"role":"user","content":"a"}],"stop_token_ids":['
    + b'"",' * 1300
    + b'""]}',
    "wrong parts of a message": b'{"messages":[{"role":"user","content":['
    + b"{}," * 1300
    + b"{}]}]}",
    "a name of a model": b'{"model":"' + "🎈".encode() * 1000 + b'","messages":[]}',
    "no JSON": b"{" * 4000,
}


@pytest.mark.parametrize("bomb", SMALL_BOMBS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_small_request_never_has_a_large_error(http, path, bomb):
    content = SMALL_BOMBS[bomb]
    assert len(content) <= 4096
    headers = {"content-type": "application/json"}
    answer = http.post(path, content=content, headers=headers)
    assert answer.status_code < 500
    assert len(answer.content) <= 8192


def test_ten_thousand_queued_requests_are_all_answered(server, http):
    body = {"prompt": "a", "n": 100, "max_tokens": 2}

    async def scenario():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=DEADLINE, limits=limits
        ) as client:
            asked = [client.post("/v1/completions", json=body) for _ in range(100)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(scenario())
    assert [answer.status_code for answer in answers] == [200] * 100
    assert sum(len(answer.json()["choices"]) for answer in answers) == 10_000
    assert sum(answer.json()["usage"]["completion_tokens"] for answer in answers) == 20_000


def test_every_fault_of_the_documentation_has_its_test():
    page = (TESTS.parent / "docs" / "faults.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), test


def test_a_signal_under_load_ends_every_stream_once_and_the_exit_code_is_0():
    """Short streams finish within the time for it; long ones end with an error."""
    flags = ("--mock-engine", "100", "--max-num-seqs", "32", "--shutdown-timeout", "3")

    async def stream(client, max_tokens, begun):
        body = {"prompt": "a", "max_tokens": max_tokens, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                begun.set()
        return [line for line in lines if line]

    async def scenario(server):
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE) as client:
            begun = [asyncio.Event() for _ in range(40)]
            # Eight of them wait in the queue.
            lengths = [20 if i % 2 else 8000 for i in range(40)]
            tasks = [
                asyncio.create_task(stream(client, length, event))
                for length, event in zip(lengths, begun, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in begun[:32]))
            server.signal(signal.SIGTERM)
            return zip(lengths, await asyncio.gather(*tasks), strict=True)

    with running(*flags) as server:
        for length, lines in asyncio.run(scenario(server)):
            assert lines.count("data: [DONE]") == 1
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2].removeprefix("data: "))
            if length == 20:
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert last["error"]["code"] == "overloaded"
        assert server.wait() == 0
