"""Mixed load for a long time: does memory stay flat, and is every request answered?

Half of the requests stream; some are cut by their client, some are refused, some share a prefix.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from .front_end_load import conditions
from .report import save_json
from .server_process import ServerUnderTest, cpu_seconds, resident_bytes, serving

STUCK_SECONDS = 600.0  # a request that takes longer counts as stuck
SAMPLE_SECONDS = 5.0
WARMUP_SHARE = 0.25  # of the samples, before which caches and pools still fill
MAX_GROWTH = 0.02
# Gauges of what is held, all 0 in the end, and counters of how accepted requests end.
HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
ENDS = (
    *("request_success_total", "request_aborted_total", "request_errored_total"),
    "request_timed_out_total",
)
SHARED = "The committee met on the first Monday of the month and heard what follows. " * 12


@dataclass(frozen=True, slots=True)
class Plan:
    """How one request is made."""

    path: str
    body: dict[str, Any]
    leave_after: int | None  # pieces after which the client goes away

    @classmethod
    def draw(cls, chance: random.Random, max_tokens: int) -> Plan:
        stream = chance.random() < 0.5
        body: dict[str, Any] = {
            "max_tokens": chance.randint(1, max_tokens),
            "stream": stream,
            "temperature": chance.choice([0.0, 0.8]),
            "n": 2 if chance.random() < 0.1 else 1,
        }
        if chance.random() < 0.02:
            body["temperature"] = -1  # refused
        text = SHARED * chance.choice([0, 0, 1]) + f"Point {chance.randrange(1000)}:"
        if chance.random() < 0.5:
            path, body["prompt"] = "/v1/completions", text
        else:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
        return cls(path, body, chance.randint(0, 5) if chance.random() < 0.1 else None)


@dataclass(slots=True)
class Record:
    """What came of the requests, and the processes' memory over time."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # answers that no server should give
    server_bytes: list[int] = field(default_factory=list)
    engine_bytes: list[int] = field(default_factory=list)
    slowest: float = 0.0
    num_choices: int = 0  # of requests that the server began to answer: the engine's requests

    @property
    def num_requests(self) -> int:
        return sum(self.ends.values())


class Connection:
    """A keep-alive HTTP/1.1 connection with no more than the soak needs: it must be cheap."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, AsyncIterator[bytes]]:
        """(status, pieces of the body)."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        content = json.dumps(body).encode()
        self._writer.write(
            f"POST {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n".encode()
            + content
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), _pieces(self._reader, head.lower())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    if b"transfer-encoding: chunked" not in head:
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        yield await reader.readexactly(length)
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def ask(connection: Connection, plan: Plan, record: Record) -> str:
    """Make one request; how it ended: done, left, refused, or in words what was wrong."""
    status, pieces = await connection.post(plan.path, plan.body)
    if status == 200:
        record.num_choices += plan.body["n"]
    parts: list[bytes] = []
    async for piece in pieces:
        parts.append(piece)
        if plan.leave_after is not None and len(parts) > plan.leave_after:
            connection.close()
            return "left"
    text = b"".join(parts)
    if status != 200:
        expected = 400 if plan.body["temperature"] < 0 else 503
        return "refused" if status == expected else f"status {status}: {text[:200]!r}"
    if plan.body["stream"]:
        whole = text.endswith(b"data: [DONE]\n\n") and b'"error"' not in text
        return "done" if whole else f"a stream ended with {text[-200:]!r}"
    num_choices = len(json.loads(text)["choices"])
    return "done" if num_choices == plan.body["n"] else f"{num_choices} choices"


class Soak:
    """Keeps ``num_clients`` requests open until the time is over or enough have been made."""

    def __init__(
        self, server: ServerUnderTest, *, deadline: float, num_requests: int | None, max_tokens: int
    ) -> None:
        self.record = Record()
        self._server = server
        self._deadline = deadline
        self._left = num_requests
        self._max_tokens = max_tokens

    async def run(self, num_clients: int) -> Record:
        async with asyncio.TaskGroup() as group:
            sampler = group.create_task(self._sample())
            clients = [group.create_task(self._client(seed)) for seed in range(num_clients)]
            await asyncio.gather(*clients)
            sampler.cancel()
        return self.record

    def _takes_another(self) -> bool:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                return False
        return time.monotonic() < self._deadline

    async def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        connection = Connection(self._server.port)
        while self._takes_another():
            start = time.monotonic()
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    end = await self._ask(connection, chance)
            except (TimeoutError, OSError, EOFError) as error:
                end = f"{type(error).__name__}: {error}"
                connection.close()
            self.record.slowest = max(self.record.slowest, time.monotonic() - start)
            if end in ("done", "left", "refused"):
                self.record.ends[end] += 1
            else:
                self.record.ends["wrong"] += 1
                self.record.wrong.append(end)
        connection.close()

    async def _ask(self, connection: Connection, chance: random.Random) -> str:
        return await ask(connection, Plan.draw(chance, self._max_tokens), self.record)

    async def _sample(self) -> None:
        engine = self._server.engine_pid
        while True:
            self.record.server_bytes.append(resident_bytes(self._server.pid))
            self.record.engine_bytes.append(resident_bytes(engine))
            await asyncio.sleep(SAMPLE_SECONDS)


def growth(samples: list[int]) -> float:
    """Of the mean of the last tenth over the mean of a tenth after the warm-up."""
    tenth = max(1, len(samples) // 10)
    start = int(WARMUP_SHARE * len(samples))
    before = samples[start : start + tenth]
    after = samples[-tenth:]
    return (sum(after) / len(after)) / (sum(before) / len(before)) - 1


async def metrics(port: int) -> dict[str, float]:
    """What the server says of itself: each number's name without its prefix, summed over labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n\r\n")
    page = (await reader.read(-1)).decode()
    writer.close()
    found: dict[str, float] = defaultdict(float)
    for line in page.splitlines():
        name, brace, value = line.partition("{")
        if brace and not line.startswith("#"):
            found[name.partition(":")[2]] += float(value.rpartition(" ")[2])
    return found


async def at_rest(port: int) -> dict[str, float]:
    """The metrics once nothing is held any more, or after a minute."""
    deadline = time.monotonic() + 60
    while True:
        found = await metrics(port)
        if not any(found[name] for name in HELD) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


async def soak(server: ServerUnderTest, asked: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    before = _cpu_seconds(server)
    run = Soak(
        server,
        deadline=start + 60 * asked.minutes,
        num_requests=asked.requests,
        max_tokens=asked.max_tokens,
    )
    record = await run.run(asked.clients)
    seconds = time.monotonic() - start
    busy = {name: round(s - before[name], 1) for name, s in _cpu_seconds(server).items()}
    counted = await at_rest(server.port)
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "requests": record.num_requests,
        "ends": dict(record.ends),
        "wrong": record.wrong[:20],
        "slowest_seconds": record.slowest,
        "server_growth": growth(record.server_bytes),
        "engine_growth": growth(record.engine_bytes),
        "server_mib": [round(n / 2**20, 1) for n in record.server_bytes[:: _stride(record)]],
        "engine_mib": [round(n / 2**20, 1) for n in record.engine_bytes[:: _stride(record)]],
        "choices_accepted": record.num_choices,
        "choices_ended": int(sum(counted[name] for name in ENDS)),
        "left_over": {name: counted[name] for name in HELD},
    }


def _cpu_seconds(server: ServerUnderTest) -> dict[str, float]:
    """Processor time by process; the client is this one."""
    return {
        "server": cpu_seconds(server.pid),
        "engine": cpu_seconds(server.engine_pid),
        "client": time.process_time(),
    }


def _stride(record: Record) -> int:
    """So that some forty samples are kept."""
    return max(1, len(record.server_bytes) // 40)


def faults(record: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [f"wrong answers: {record['wrong']}"] if record["wrong"] else []
    found += [f"left over: {record['left_over']}"] if any(record["left_over"].values()) else []
    if record["choices_accepted"] != record["choices_ended"]:
        found.append(f"of {record['choices_accepted']} {record['choices_ended']} ended")
    for name in ("server_growth", "engine_growth"):
        if record[name] > MAX_GROWTH:
            found.append(f"{name} {record[name]:.1%} is above {MAX_GROWTH:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--requests", type=int, help="end after so many, if the time allows")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument(
        "--mock-engine", type=float, metavar="RATE", help="no model: that many tokens/s each"
    )
    parser.add_argument("--result", type=Path, default=Path("bench-results/soak.json"))
    asked = parser.parse_args()
    # A cache so small that all of its memory has been touched by the end of the warm-up.
    flags = ["--max-num-seqs", "64", "--kv-cache-memory-bytes", "64M"]
    rate = asked.mock_engine
    flags += ["--mock-engine", str(rate)] if rate else ["--attention", "nsa"]
    with (
        serving(*flags) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        record = {
            **conditions(),
            "engine": f"mock of {rate:g} tokens/s" if rate else "embedded model, NSA",
            "cores": len(os.sched_getaffinity(0)),
            "clients": asked.clients,
            "max_tokens": asked.max_tokens,
            **runner.run(soak(server, asked)),
        }
    save_json(asked.result, record)
    print(json.dumps(record, indent=1))
    if wrong := faults(record):
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
