"""An engine without a model, a tokenizer of bytes, and a server over both, for tests."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import httpx
import openai

from nsa_serve.errors import EngineDead, TemplateError
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    RequestTimes,
    TokenLogprob,
    TokenTrace,
    Usage,
)
from nsa_serve.server import serve as serve_room
from nsa_serve.server.app import create_app
from nsa_serve.server.flags import ServeFlags
from nsa_serve.server.output_stream import Sink
from nsa_serve.server.settings import ServerSettings
from nsa_serve.stats import CacheMap, EngineStats, StatsSnapshot, TierReport

VOCAB = 258
BOS = 256
MODEL = "fake"


class ByteTokenizer:
    """Every byte is a token, id 256 begins a text, id 257 ends one.

    With a ``tool_template`` it shows tools by itself, before the conversation.
    """

    def __init__(self, tool_template: str | None = None) -> None:
        self.tool_template = tool_template
        self.turns: list[Mapping[str, Any]] = []  # of the last conversation

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [BOS] * (add_special and bool(text)) + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        self.turns = list(messages)
        if variables.get("refuse"):
            raise TemplateError("this template refuses", param="messages")
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        shown = f"<tools>{json.dumps(tools)}" if tools else ""
        return shown + turns + "<assistant>" * add_generation_prompt + variables.get("begin", "")


def entry(token_id: int, num_top: int) -> TokenLogprob:
    """A token of log-probability -0.5, and below it the ids that follow."""
    top = [(token_id + i, -0.5 - i) for i in range(num_top)]
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=top)


class FakeEngine:
    """Answers ``reply`` one byte an output. ``gate`` closed holds every answer before its end."""

    def __init__(self, reply: str = "Hi é!") -> None:
        self.reply = reply
        self.reason = FinishReason.STOP
        self.stop_reason: str | int | None = None
        self.error_after: int | None = None  # outputs before the request fails
        self.error: Exception | str = "the logits were NaN at /srv/engine.py"
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.frozen = False
        self.num_dumps = 0
        self.dead = False
        self.num_cached = 3
        self.gated = True
        self.tier: TierReport | None = None

    async def submit(
        self, request: EngineRequest, sink: Sink | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.dead:
            raise EngineDead("the engine process ended at /srv/engine.py")
        self.requests.append(request)
        try:
            async for output in self._outputs(request):
                if sink is None or not sink(output):
                    yield output
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise

    async def _outputs(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        pieces = self._pieces(request)
        for position, piece in enumerate(pieces):
            if position == self.error_after:
                yield self._failure(request)
                return
            if position == len(pieces) - 1:
                await self.gate.wait()
            yield piece
            if piece.finish_reason is None:
                await asyncio.sleep(0)

    def _failure(self, request: EngineRequest) -> RequestOutput:
        if isinstance(self.error, Exception):
            raise self.error
        return RequestOutput(
            request_id=request.request_id, finish_reason=FinishReason.ERROR, error=self.error
        )

    def _pieces(self, request: EngineRequest) -> list[RequestOutput]:
        token_ids = list(self.reply.encode())[: request.sampling.max_tokens]
        groups = [[i] for i in token_ids] if request.stream else [token_ids]
        done, pieces = b"", []
        for number, group in enumerate(groups):
            before = done.decode(errors="ignore")
            done += bytes(group)
            text = done.decode(errors="ignore")[len(before) :]
            pieces.append(self._piece(request, group, text, number == 0, number == len(groups) - 1))
        return pieces

    def _piece(
        self, request: EngineRequest, ids: list[int], text: str, first: bool, last: bool
    ) -> RequestOutput:
        sampling = request.sampling
        wanted = sampling.logprobs
        shown = sampling.prompt_logprobs
        prompt = request.prompt_token_ids
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=ids,
            logprobs=None if wanted is None else [entry(i, wanted) for i in ids],
            prompt_logprobs=(
                [None, *(entry(i, shown) for i in prompt[1:])]
                if first and shown is not None
                else None
            ),
            finish_reason=self.reason if last else None,
            stop_reason=self.stop_reason if last else None,
            usage=self._usage(request) if last else None,
            trace=self._trace(request) if last and sampling.trace else None,
            times=RequestTimes(arrival=1.0, first_scheduled=1.25, first_token=2.0, last_token=3.5)
            if last
            else None,
        )

    def _trace(self, request: EngineRequest) -> list[TokenTrace]:
        """Token i, of one layer with one KV head, read blocks 0 and i; its gates are i/10."""
        start = len(request.prompt_token_ids) - 1
        return [
            TokenTrace(
                start + i,
                (1, 1, 2),
                struct.pack("<2i", 0, i),
                struct.pack("<3f", *[i / 10] * 3) if self.gated else None,
                token_id,
            )
            for i, token_id in enumerate(self.reply.encode()[: request.sampling.max_tokens])
        ]

    def _usage(self, request: EngineRequest) -> Usage:
        generated = len(self.reply.encode()[: request.sampling.max_tokens])
        return Usage(
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=generated,
            cached_tokens=self.num_cached,
        )

    async def ping(self, timeout: float) -> None:
        if self.dead:
            raise EngineDead("gone")
        if self.frozen:
            raise TimeoutError

    def cpu_seconds(self) -> float | None:
        return None

    def dump_stacks(self) -> None:
        self.num_dumps += 1

    async def cache_map(self, patience: float) -> CacheMap | None:
        return CacheMap(bytes([2, 1, 255, 0, 0, 0, 0, 0]), [1])

    async def stats(self) -> StatsSnapshot:
        counters = EngineStats(num_steps=2, prefix_queries=10, prefix_hits=4, generation_tokens=7)
        counters.tier = self.tier
        counters.count_step(5)
        counters.num_finished[FinishReason.STOP] = 3
        counters.num_finished[FinishReason.ABORT] = 2
        return counters.snapshot(
            num_running=1, num_waiting=2, num_blocks=8, num_blocks_in_use=2, num_blocks_cached=1
        )


class Server:
    """The application over a fake engine, and a client of it."""

    def __init__(self, engine: FakeEngine, client: httpx.AsyncClient, app: Any) -> None:
        self.engine = engine
        self.client = client
        self.services = app.state.services

    @property
    def openai(self) -> openai.AsyncOpenAI:
        """The official client, speaking to the application without a socket."""
        return openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", max_retries=0, http_client=self.client
        )

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def chat(self, content: Any = "Hello", **fields: Any) -> httpx.Response:
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return await self.post("/v1/chat/completions", {"messages": messages, **fields})

    async def complete(self, prompt: Any = "Hello", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": prompt, **fields})


@asynccontextmanager
async def fake_server(
    tokenizer: ByteTokenizer | None = None, tracing: Any = None, **settings: Any
) -> AsyncIterator[Server]:
    """A server of the fake model with these settings in place of the defaults."""
    engine = FakeEngine()
    known = {"model_names": (MODEL,), "max_model_len": 1000, "vocab_size": VOCAB}
    app = create_app(
        engine, tokenizer or ByteTokenizer(), ServerSettings(**{**known, **settings}), tracing
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield Server(engine, client, app)
    finally:
        app.state.services.workers.close()


@asynccontextmanager
async def listening(flags: ServeFlags) -> AsyncIterator[int]:
    """The port of a server with these flags over the fake engine, on a socket."""
    async with fake_server() as fake:
        config = serve_room._uvicorn_config(fake.client._transport.app, flags)
        server = serve_room._Uvicorn(config)
        with closing(serve_room._bind(flags)) as listener:
            task = asyncio.create_task(server.serve([listener]))
            await server.listening.wait()
            try:
                yield listener.getsockname()[1]
            finally:
                server.should_exit = True
                await task


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream as objects, without comments and the [DONE] that must be last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
