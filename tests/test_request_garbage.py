"""What a request leaves behind is freed at once, not at the garbage collector's next full round."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import httpx
import pytest

from nsa_serve.server.flags import ServeFlags
from nsa_serve.server.generation import Generation
from tests.server_fakes import listening

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", CHAT),
        ("/chat/completions", {**CHAT, "stream": True}),
        ("/completions", {"prompt": "hi", "n": 2}),
        ("/completions", {"prompt": "hi", "stream": True}),
    ],
)
def test_an_answered_request_is_freed_without_the_garbage_collector(monkeypatch, path, body):
    made = []
    begin = Generation.__init__

    def remember(self, *arguments, **options):
        made.append(weakref.ref(self))
        begin(self, *arguments, **options)

    monkeypatch.setattr(Generation, "__init__", remember)

    async def scenario():
        async with listening(ServeFlags(port=0)) as port, httpx.AsyncClient() as client:
            for _ in range(3):
                answer = await client.post(f"http://127.0.0.1:{port}/v1{path}", json=body)
                assert answer.status_code == 200
        return [generation() is None for generation in made]

    with no_collection():
        freed = asyncio.run(scenario())
    assert freed == [True, True, True]
