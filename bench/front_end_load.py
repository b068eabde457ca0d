"""What the HTTP front end carries by itself: many streams from an engine without a model.

The mock engine makes a token for every stream at whole multiples of its period on the machine's
monotonic clock, all at once, as a real step does. So the latency that the front end adds is the
time of arrival less the last multiple before it. It includes the engine's own work for the step.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from .report import save_json
from .server_process import COMMAND, ServerUnderTest, cpu_seconds, serving

RAMP = 1.0  # seconds over which the streams start
MARGIN = 1.0  # seconds after the last start that are not measured
PROMPT = "Tell me a story of three sentences."


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server."""

    num_streams: int
    rate: float  # tokens/s of each stream
    seconds: float  # measured, after all streams have begun

    @property
    def num_tokens(self) -> int:
        """Of each stream: enough for the start, the measured time and a rest."""
        return int(self.rate * (RAMP + MARGIN + self.seconds + 1))


class Reader(asyncio.Protocol):
    """One connection: sends a request and notes when how many events came."""

    def __init__(self, request: bytes, load: Load) -> None:
        self._request = request
        self._period = 1 / load.rate
        self.arrivals: list[tuple[float, int]] = []  # (clock, events)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tail = b""  # the last two pieces: the end and what is before it, however it was cut
        self._last = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.monotonic(), data.count(b"data: {")))
        self.tail = self._last + data
        self._last = data
        if b"[DONE]" in self.tail and not self.ended.done():
            self.ended.set_result(None)
            assert self._transport is not None
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"a stream was cut: {self.tail[-200:]!r}"))

    @property
    def num_tokens(self) -> int:
        """What the server says that it sent: the usage at the end of the stream."""
        usage = self.tail.rpartition(b'"completion_tokens":')[2]
        return int(usage[: usage.index(b",")])


def request_bytes(load: Load, path: str) -> bytes:
    body: dict[str, Any] = {
        "max_tokens": load.num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        body["prompt"] = PROMPT
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def drive(
    server: ServerUnderTest, load: Load, path: str, *, sampled: bool = False
) -> dict[str, Any]:
    """Run the load against the server; figures of the measured window, which is what a server
    that samples itself samples.
    """
    # The client's own pauses would be counted as the server's.
    gc.disable()
    loop = asyncio.get_running_loop()
    request = request_bytes(load, path)
    readers = []
    for _ in range(load.num_streams):
        _, reader = await loop.create_connection(
            lambda: Reader(request, load), "127.0.0.1", server.port
        )
        readers.append(reader)
        await asyncio.sleep(RAMP / load.num_streams)
    await asyncio.sleep(MARGIN)
    if sampled:
        os.kill(server.pid, signal.SIGUSR2)
    start, busy = time.monotonic(), cpu_seconds(server.pid)
    await asyncio.sleep(load.seconds)
    stop, busy = time.monotonic(), cpu_seconds(server.pid) - busy
    if sampled:
        os.kill(server.pid, signal.SIGUSR2)
    await asyncio.gather(*(reader.ended for reader in readers))
    return figures(readers, load, start, stop, busy)


def figures(
    readers: list[Reader], load: Load, start: float, stop: float, busy: float
) -> dict[str, Any]:
    """Throughput, processor time and latencies from ``start`` to ``stop``.

    Raises ``AssertionError`` where a stream lost tokens.
    """
    short = [reader.num_tokens for reader in readers if reader.num_tokens != load.num_tokens]
    assert not short, f"streams of {load.num_tokens} tokens ended with {short}"
    period = 1 / load.rate
    latencies: list[float] = []
    num_events = 0
    for reader in readers:
        for at, count in reader.arrivals:
            if start <= at < stop:
                num_events += count
                latencies += [1e3 * (at % period)] * count
    latencies.sort()
    seconds = stop - start
    return {
        "offered_tokens_per_s": load.num_streams * load.rate,
        "events_per_s": num_events / seconds,
        "server_cores": busy / seconds,
        "events_per_core_second": num_events / busy,
        "added_latency_ms": {
            name: latencies[int(share * (len(latencies) - 1))]
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        },
    }


def measure(load: Load, path: str, profile: Path | None = None) -> dict[str, Any]:
    """Start a server, load it, end it; the figures."""
    sampled = (sys.executable, "-m", "nsa_serve.bench.sampled", str(profile))
    flags = ("--mock-engine", str(load.rate), "--max-num-seqs", str(load.num_streams))
    with (
        serving(*flags, command=sampled if profile else COMMAND) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(drive(server, load, path, sampled=profile is not None))


def conditions() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "real_time": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        "nice": os.nice(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of each stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--path", default="/v1/chat/completions")
    parser.add_argument("--result", type=Path, default=Path("bench-results/front_end.json"))
    parser.add_argument("--profile", action="store_true", help="a second run, sampled")
    asked = parser.parse_args()
    load = Load(asked.num_streams, asked.rate, asked.seconds)
    record: dict[str, Any] = {**conditions(), "load": asdict(load), "path": asked.path}
    record |= measure(load, asked.path)
    if asked.profile:
        with tempfile.TemporaryDirectory() as folder:
            samples = Path(folder) / "samples.json"
            measure(load, asked.path, samples)
            record["profile"] = json.loads(samples.read_text())
    save_json(asked.result, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
