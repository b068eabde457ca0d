"""A server with OpenAI's routes whose answers, delays and faults are scripted, in the same loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "scripted"


@dataclass
class Answer:
    """One stream: seconds before each token's chunk, and how it ends."""

    gaps: list[float]
    text: str = " w"
    status: int = 200
    message: str = ""
    usage: bool = True
    cached: int = 0
    error_after: int | None = None  # tokens before an error event
    cut_after: int | None = None  # tokens before the connection is dropped
    reason: str = "length"


@dataclass
class ScriptedAPI:
    """``script(number, body)`` gives each generation's answer; tokens are bytes."""

    script: Callable[[int, dict[str, Any]], Answer]
    metrics: str = ""
    tokenizes: bool = True
    bos: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_connections: int = 0
    running: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def connect(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Join a client to this server by a socket pair."""
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().create_connection(protocol, sock=theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        self.num_connections += 1
        self._tasks.append(asyncio.create_task(self._serve(reader, writer)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(size) or b"{}")
                self.heads.append(head)
                await self._route(head.split()[1], body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _route(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path.endswith("/completions"):
            await self._generate(path, body, writer)
        elif path == "/v1/models":
            _whole(writer, 200, {"data": [{"id": MODEL}]})
        elif path == "/tokenize" and self.tokenizes:
            special = [256] * (self.bos and body.get("add_special_tokens", True))
            _whole(writer, 200, {"tokens": special + list(body["prompt"].encode())})
        elif path == "/detokenize" and self.tokenizes:
            text = bytes(i for i in body["tokens"] if i < 256).decode("utf-8", "replace")
            _whole(writer, 200, {"prompt": text})
        elif path == "/metrics" and self.metrics:
            page = self.metrics.replace("RUNNING", str(self.running)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page)
        else:
            _whole(writer, 404, {"error": {"message": f"no {path}"}})

    async def _generate(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        answer = self.script(len(self.bodies), body)
        self.bodies.append(body)
        if answer.status != 200:
            _whole(writer, answer.status, {"error": {"message": answer.message}})
            return
        self.running += 1
        try:
            await self._stream("chat" in path, body, answer, writer)
        finally:
            self.running -= 1

    async def _stream(
        self, chat: bool, body: dict[str, Any], answer: Answer, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if chat:
            _chunk(writer, _choice({"delta": {"role": "assistant", "content": ""}}))
        for number, gap in enumerate(answer.gaps):
            if number == answer.cut_after:
                writer.close()
                return
            if number == answer.error_after:
                _chunk(writer, {"error": {"message": answer.message}})
                break
            await asyncio.sleep(gap)
            piece = {"delta": {"content": answer.text}} if chat else {"text": answer.text}
            _chunk(writer, _choice(piece))
        else:
            for event in self._closing(chat, body, answer):
                _chunk(writer, event)
        _chunk(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def _closing(
        self, chat: bool, body: dict[str, Any], answer: Answer
    ) -> Iterator[dict[str, Any]]:
        yield _choice({"delta": {}} if chat else {"text": ""}, answer.reason)
        if answer.usage:
            prompt = body.get("prompt") or "".join(m["content"] for m in body["messages"])
            yield {
                "choices": [],
                "usage": {
                    "prompt_tokens": len(prompt.encode()) + self.bos,
                    "completion_tokens": len(answer.gaps),
                    "prompt_tokens_details": {"cached_tokens": answer.cached},
                },
            }


def _choice(piece: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": reason, **piece}]}


def _chunk(writer: asyncio.StreamWriter, event: dict[str, Any] | str) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    text = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(text), text))


def _whole(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    text = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
