"""The engine in its own process, spoken to by its client: text, refusals, aborts, and deaths."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.errors import (
    CheckpointError,
    ConfigError,
    EngineDead,
    InvalidParameter,
    Overloaded,
    PromptTooLong,
)
from nsa_serve.request import EngineRequest, FinishReason, RequestOutput, TokenLogprob
from nsa_serve.server.client import EngineClient
from nsa_serve.server.output_stream import merge
from nsa_serve.tokenizer import Tokenizer
from tests.checkpoints import TINY_LLAMA, write_config
from tests.scripted_engine import make_request

ROOT = Path(__file__).parent.parent
LONG = {"max_tokens": 400, "ignore_eos": True}
T = TypeVar("T")


class Engine:
    """A client and the event loop it lives on; nothing moves on the loop between two calls."""

    def __init__(self, config: EngineConfig) -> None:
        self.runner = asyncio.Runner()
        self.progress: list[tuple[int, int]] = []
        self.client = self.run(
            EngineClient.start(config, lambda done, total: self.progress.append((done, total)))
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.client.aclose())
        self.runner.close()

    @property
    def pid(self) -> int:
        return self.client._process.pid


def tiny_config(folder: Path, **flags: Any) -> EngineConfig:
    """Random weights of a small shape: starts as fast as torch is imported."""
    write_config(folder, TINY_LLAMA)
    return EngineConfig.from_flags(
        model=str(folder), random_weights=True, device="cpu", kv_cache_memory_bytes=4 << 20, **flags
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The embedded model."""
    config = EngineConfig.from_flags(
        device="cpu", kv_cache_memory_bytes=32 << 20, max_num_seqs=2, max_num_queued_reqs=2
    )
    engine = Engine(config)
    yield engine
    engine.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tiny_config(tmp_path))
    yield engine
    engine.close()


async def collect(client: EngineClient, request: EngineRequest) -> list[RequestOutput]:
    return [output async for output in client.submit(request)]


async def first_outputs(client: EngineClient, name: str, count: int = 1) -> None:
    """Read ``count`` outputs, then go away."""
    outputs = client.submit(make_request(name, **LONG))
    for _ in range(count):
        await anext(outputs)
    await outputs.aclose()


async def until_idle(client: EngineClient) -> None:
    """Turn the engine's loop until it runs nothing."""
    while True:
        await client.ping(30)
        stats = await client.stats()
        if not stats.num_running + stats.num_waiting:
            return


def test_the_embedded_model_answers_through_the_process(engine: Engine) -> None:
    assert engine.client.engine.tokenizer is not None
    tokenizer = Tokenizer(engine.client.engine.tokenizer)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    request = make_request("paris", prompt, temperature=0.0, max_tokens=16, stop=("is Par",))
    outputs = engine.run(collect(engine.client, request))
    assert "".join(output.text for output in outputs) == "The capital of France "
    assert outputs[-1].stop_reason == "is Par"
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.prompt_tokens == len(prompt)
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_a_map_of_the_cache_comes_when_asked_for_and_the_last_one_when_there_is_no_time(
    engine: Engine,
) -> None:
    fresh = engine.run(engine.client.cache_map(30))
    assert fresh is not None
    assert len(fresh.holders) == engine.client.engine.num_blocks
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        assert engine.run(engine.client.cache_map(0.01)) == fresh
    finally:
        os.kill(engine.pid, signal.SIGCONT)


def test_what_waits_for_the_disk_is_written_when_the_engine_is_stopped(tmp_path: Path) -> None:
    write_config(tmp_path / "model", TINY_LLAMA)
    config = EngineConfig.from_flags(
        model=str(tmp_path / "model"), random_weights=True, device="cpu", max_num_seqs=1,
        kv_cache_memory_bytes=270_000, kv_disk_dir=str(tmp_path / "disk"),
    )  # fmt: skip
    engine = Engine(config)
    for first in range(2):  # the second prompt takes the place of the first one's pages
        request = make_request(f"r{first}", [first + 3] * 450, max_tokens=1)
        engine.run(collect(engine.client, request))
    engine.close()
    assert list(tmp_path.glob("disk/*/*.pages"))


def test_the_start_told_its_progress_and_what_runs(engine: Engine) -> None:
    done = [done for done, _ in engine.progress]
    assert done == sorted(done)
    assert engine.progress[-1][0] == engine.progress[-1][1] > 50 << 20
    description = engine.client.engine
    assert (description.model_name, description.attention) == ("smollm2-135m-instruct", "dense")
    assert description.max_model_len <= description.cache_tokens
    assert (description.bos_token_id, description.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (make_request("a", [5] * 9000), PromptTooLong, "maximum context length"),
        (make_request("b", []), InvalidParameter, "empty"),
        (make_request("c", [49152]), InvalidParameter, "token ids"),
        (make_request("d", temperature=float("nan")), InvalidParameter, "temperature"),
        (make_request("e", seed=1 << 70), InvalidParameter, "can't be sent"),
        (make_request("f", stop=("\ud800",)), InvalidParameter, "can't be sent"),
        (make_request("g", temperature="hot"), InvalidParameter, "Expected `float`"),
    ],
)
def test_a_bad_request_raises_the_engines_own_error_and_the_engine_lives(
    engine: Engine, request_: EngineRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.run(collect(engine.client, request_))
    engine.run(engine.client.ping(30))


def test_the_refused_field_survives_the_wire(engine: Engine) -> None:
    with pytest.raises(InvalidParameter) as caught:
        engine.run(collect(engine.client, make_request("a", top_p=3.0)))
    assert caught.value.param == "top_p"


def test_a_full_queue_is_overloaded_with_a_time_to_come_back(engine: Engine) -> None:
    async def flood() -> list[Any]:
        requests = [make_request(f"flood-{i}", max_tokens=4, ignore_eos=True) for i in range(8)]
        work = [collect(engine.client, request) for request in requests]
        return await asyncio.gather(*work, return_exceptions=True)

    results = engine.run(flood())
    refused = [r for r in results if isinstance(r, Overloaded)]
    served = [r for r in results if isinstance(r, list)]
    assert refused
    assert len(refused) + len(served) == 8
    assert all(error.retry_after >= 1 for error in refused)
    assert all(outputs[-1].finish_reason is FinishReason.LENGTH for outputs in served)


def test_a_reader_that_goes_away_aborts_its_request(engine: Engine) -> None:
    before = engine.run(engine.client.stats()).num_finished["abort"]
    engine.run(first_outputs(engine.client, "closed"))

    async def cancelled() -> None:
        task = asyncio.create_task(first_outputs(engine.client, "cancelled", count=300))
        await engine.client.ping(30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    engine.run(cancelled())
    engine.run(until_idle(engine.client))
    assert engine.run(engine.client.stats()).num_finished["abort"] == before + 2
    assert not engine.client._streams


def test_an_id_in_use_is_refused_until_its_request_has_ended(engine: Engine) -> None:
    async def twice() -> None:
        outputs = engine.client.submit(make_request("same", **LONG))
        await anext(outputs)
        with pytest.raises(InvalidParameter, match="running already"):
            await collect(engine.client, make_request("same"))
        await outputs.aclose()

    engine.run(twice())
    engine.run(until_idle(engine.client))
    outputs = engine.run(collect(engine.client, make_request("same", max_tokens=1)))
    assert outputs[-1].finish_reason is not None


def test_a_frozen_engine_fails_its_ping_and_a_thawed_one_answers(engine: Engine) -> None:
    engine.run(until_idle(engine.client))  # no report is under way, which would be heard
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            engine.run(engine.client.ping(0.2))
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    engine.run(engine.client.ping(30))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_engine_are_the_servers_to_handle(engine: Engine, number: int) -> None:
    os.kill(engine.pid, number)
    engine.run(engine.client.ping(30))


def test_a_killed_engine_ends_every_stream_with_engine_dead_within_two_seconds(
    tiny: Engine,
) -> None:
    client = tiny.client

    async def die() -> list[Any]:
        streams = [client.submit(make_request(f"r{i}", **LONG)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        os.kill(tiny.pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            ends = [_last(stream) for stream in streams]
            return await asyncio.gather(*ends, client.died(), return_exceptions=True)

    *ends, died = tiny.run(die())
    assert [type(end) for end in ends] == [EngineDead] * 3
    assert died is None
    for work in (collect(client, make_request("late")), client.ping(1), client.stats()):
        with pytest.raises(EngineDead):
            tiny.run(work)


async def _last(stream: Any) -> None:
    async for _ in stream:
        pass


def test_closing_drains_what_is_open_refuses_what_is_new_and_aborts_the_rest(
    tmp_path: Path,
) -> None:
    tiny = Engine(tiny_config(tmp_path))
    client = tiny.client

    async def close() -> tuple[list[RequestOutput], list[RequestOutput]]:
        short = asyncio.create_task(collect(client, make_request("short", max_tokens=5)))
        await asyncio.sleep(0)
        await client._drain(30)
        long = asyncio.create_task(collect(client, make_request("long", **LONG)))
        await client.ping(30)
        closing = asyncio.create_task(client.aclose(drain=0.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="shutting down"):
            await collect(client, make_request("new"))
        await closing
        return await short, await long

    short, long = tiny.run(close())
    assert short[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert long[-1].finish_reason is FinishReason.ABORT
    assert client._process.returncode == 0
    assert not Path(client._folder).exists()
    tiny.close()


def test_an_engine_whose_server_was_killed_goes_too(tmp_path: Path) -> None:
    write_config(tmp_path / "model", TINY_LLAMA)
    script = textwrap.dedent(f"""
        import asyncio
        from nsa_serve.config import EngineConfig
        from nsa_serve.server.client import EngineClient

        async def main():
            client = await EngineClient.start(EngineConfig.from_flags(
                model={str(tmp_path / "model")!r}, random_weights=True, device="cpu",
                kv_cache_memory_bytes=4 << 20))
            print(client._process.pid, client._folder, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        pid, folder = server.stdout.readline().split()
        watch = os.pidfd_open(int(pid))
        server.kill()
    assert select.select([watch], [], [], 10)[0], "the engine outlived its server"
    os.close(watch)
    assert not Path(folder).exists()


def test_a_model_that_can_not_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with asyncio.Runner() as runner, pytest.raises(CheckpointError, match="nowhere") as caught:
        runner.run(EngineClient.start(EngineConfig.from_flags(model=missing, device="cpu")))
    assert "\n" not in str(caught.value)


def test_a_temporary_folder_too_deep_for_a_socket_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with asyncio.Runner() as runner, pytest.raises(ConfigError, match="TMPDIR"):
        runner.run(EngineClient.start(EngineConfig()))
    assert not list(deep.iterdir())


def test_a_slow_reader_gets_what_came_meanwhile_as_one_output() -> None:
    entry = TokenLogprob(1, -1.0, 1, [])
    outputs = [
        RequestOutput(
            request_id="a", text="x", token_ids=[1], logprobs=[entry], prompt_logprobs=[None]
        ),
        RequestOutput(request_id="a", text="y", token_ids=[2], logprobs=[entry]),
        RequestOutput(request_id="a", text="z", finish_reason=FinishReason.STOP),
    ]
    merged = merge(outputs)
    assert (merged.text, merged.token_ids) == ("xyz", [1, 2])
    assert merged.logprobs == [entry, entry]
    assert merged.prompt_logprobs == [None]
    assert merged.finish_reason is FinishReason.STOP
