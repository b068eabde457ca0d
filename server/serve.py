"""``nsa-serve serve``: start the engine, listen, drain when told to stop, end with a code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from ..config import EngineConfig
from ..engine.messages import EngineDescription
from ..errors import ConfigError, EngineDead
from .admission import Admission
from .app import create_app
from .client import EngineClient
from .flags import ServeFlags
from .http_protocol import BoundedHttp
from .log_format import configure_logging
from .services import Services
from .settings import ServerSettings
from .startup import server_settings, start_engine, tokenizer_of
from .stats_line import log_stats

if TYPE_CHECKING:
    from .tracing import SpanRecorder

STATS_INTERVAL = 10.0  # seconds
WATCH_INTERVAL = 2.0  # seconds between two questions to the engine
_BACKLOG = 2048
_AT_ONCE = 1  # seconds, and
_LAST_WORDS = 3  # seconds, for connections to close after the streams have ended
_STALL_MS = 30_000  # for a client that reads nothing while an answer waits for it
_KEEP_ALIVE = 75  # seconds; longer than a client's pool keeps a connection it may use again

logger = logging.getLogger("nsa_serve")


def serve(flags: ServeFlags) -> int:
    """Serve until told to stop. Returns the exit code: 0 after a drain, 1 if work was lost.

    Raises ``ConfigError`` or ``CheckpointError`` for what can't be served.
    """
    configure_logging(flags.log_format)
    config = flags.engine_config()
    _check_certificate(flags)
    with (
        contextlib.closing(_bind(flags)) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_serve(flags, config, listener))


def _check_certificate(flags: ServeFlags) -> None:
    """Raise ``ConfigError`` for a certificate that can't be served, before the model is loaded."""
    if flags.ssl_certfile is None:
        return
    where = f"--ssl-certfile {flags.ssl_certfile} --ssl-keyfile {flags.ssl_keyfile}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            flags.ssl_certfile, flags.ssl_keyfile
        )
    except ssl.SSLError as error:
        raise ConfigError(f"{where}: {error.reason or error}") from None
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None


def _bind(flags: ServeFlags) -> socket.socket:
    """The address, taken before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux only. Connections inherit it: one whose client takes nothing for so long is cut.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALL_MS)
    try:
        listener.bind((flags.host, flags.port))
    except OSError as error:
        listener.close()
        where = f"--host {flags.host} --port {flags.port}"
        advice = "; --port 0 takes any free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"{where}: {error.strerror or error}{advice}") from None
    return listener


async def _serve(flags: ServeFlags, config: EngineConfig, listener: socket.socket) -> int:
    engine = await start_engine(config)
    try:
        return await _run(flags, config, engine, listener)
    finally:
        await engine.aclose()


async def _run(
    flags: ServeFlags, config: EngineConfig, engine: EngineClient, listener: socket.socket
) -> int:
    tokenizer = await asyncio.to_thread(tokenizer_of, engine.engine)
    settings = _with_door(server_settings(flags, config, engine.engine), flags)
    tracing = _tracing(flags, settings.model_name)
    app = create_app(engine, tokenizer, settings, tracing)
    server = _Uvicorn(_uvicorn_config(app, flags))
    services: Services = app.state.services
    stopper = _Stopper(server, services.admission, flags.shutdown_timeout)
    stopper.install()
    # A full collection would walk all that was imported, and no stream moves meanwhile.
    gc.collect()
    gc.freeze()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_stop_when_dead(engine, stopper)),
            group.create_task(services.watchdog.watch(WATCH_INTERVAL)),
            group.create_task(log_stats(engine, STATS_INTERVAL)),
            group.create_task(_announce(server, engine.engine, flags, listener)),
        ]
        await server.serve([listener])
        for task in tasks:
            task.cancel()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    return stopper.exit_code


def _tracing(flags: ServeFlags, model: str) -> SpanRecorder | None:
    """Where spans go. Raises ``ConfigError`` where the extra isn't installed."""
    endpoint = flags.otlp_traces_endpoint
    if endpoint is None:
        return None
    try:
        from .tracing import span_recorder
    except ImportError:
        raise ConfigError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install 'nsa-serve[otel]'"
        ) from None
    return span_recorder(endpoint, model)


def _with_door(settings: ServerSettings, flags: ServeFlags) -> ServerSettings:
    """The settings with those of a server that others reach."""
    return replace(
        settings,
        api_keys=tuple(flags.api_key or ()),
        allowed_origins=tuple(flags.allowed_origins or ()),
        metrics_prefix=flags.metrics_prefix,
    )


class _Uvicorn(uvicorn.Server):
    """uvicorn, with signals left to us: it would close its door before the drain."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def _uvicorn_config(app: Any, flags: ServeFlags) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_WORDS,
        ssl_keyfile=flags.ssl_keyfile,
        ssl_certfile=flags.ssl_certfile,
    )


class _Stopper:
    """Ends the server: drained at the first signal, at once at the second or with the engine."""

    def __init__(self, server: _Uvicorn, admission: Admission, timeout: float) -> None:
        self._server = server
        self._admission = admission
        self._timeout = timeout
        self._draining: asyncio.Task[None] | None = None
        self.exit_code = 0

    def install(self) -> None:
        """Take the signals of this process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            logger.warning("stopping at once")
            self.stop_now()

    async def _drain(self) -> None:
        if self._admission.num_open:
            logger.info("finishing %d open requests", self._admission.num_open)
        await self._admission.drain(self._timeout)
        self._server.should_exit = True

    def stop_now(self) -> None:
        """Cut what is open; the exit code tells that something was."""
        self.exit_code = 1
        self._admission.cut()
        self._server.config.timeout_graceful_shutdown = _AT_ONCE
        self._server.should_exit = True

    async def stop_after_death(self) -> None:
        """The engine is gone: its streams end with an error, and then the process."""
        self.exit_code = 1
        self._admission.draining = True
        await self._admission.end_all(EngineDead("the engine process ended"))
        self._server.should_exit = True


async def _stop_when_dead(engine: EngineClient, stopper: _Stopper) -> None:
    await engine.died()
    logger.error("the engine process ended; the server ends too")
    await stopper.stop_after_death()


async def _announce(
    server: _Uvicorn, engine: EngineDescription, flags: ServeFlags, listener: socket.socket
) -> None:
    await server.listening.wait()
    scheme = "https" if flags.ssl_certfile else "http"
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    url = f"{scheme}://{host}:{listener.getsockname()[1]}/v1"
    print(ready_line(engine, url), file=sys.stderr, flush=True)
    if not flags.api_key and not is_loopback(flags.host):
        logger.warning("everybody who reaches %s may use this server; see --api-key", flags.host)
    if engine.attention == "nsa" and not engine.trained_sparse:
        print(untrained_line(engine), file=sys.stderr, flush=True)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def ready_line(engine: EngineDescription, url: str) -> str:
    """What a person wants to know once the server takes requests."""
    return (
        f"Ready: {url} · model {engine.model_name} ({engine.dtype} on {engine.device}) · "
        f"attention {engine.attention} · context {engine.max_model_len:,} tokens · "
        f"cache {engine.cache_tokens:,} tokens"
    )


def untrained_line(engine: EngineDescription) -> str:
    """What NSA means on a checkpoint that was trained dense."""
    return (
        f"Note: {engine.model_name} was trained dense. Served with NSA its answers equal dense "
        "attention's up to 1024 tokens of context; beyond that the block selection is untrained."
    )
