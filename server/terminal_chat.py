"""``nsa-serve chat``: a conversation in the terminal, with a server that runs or its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import httpx

from ..errors import ConfigError
from .log_format import LEVEL_VARIABLE

_POLL = 0.2  # seconds between two looks at a server that starts
_PATIENCE = 10.0  # seconds for a server to name its model
_GREETING = "{} is listening. /clear forgets the conversation, /quit (or Ctrl-D) ends it.\n"
_COMMANDS = "Commands: /clear forgets the conversation, /quit ends it.\n"
# A path, which has a second slash in its first word, is a message.
_COMMAND = re.compile(r"/[A-Za-z?]*(?!\S)")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How the model is asked; None leaves it to the server."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    api_key: str | None = None


def chat(url: str | None, serve_arguments: Sequence[str], settings: ChatSettings) -> int:
    """Talk until the input ends. Returns the exit code."""
    if url is not None and serve_arguments:
        raise ConfigError(
            f"with --url no server is started, so {' '.join(serve_arguments)} has no use"
        )
    own = contextlib.nullcontext(url) if url else own_server(serve_arguments)
    with own as found, _client(str(found), settings) as client:
        Conversation(client, served_model(client), settings, sys.stdout).run(_lines())
    return 0


def _client(url: str, settings: ChatSettings) -> httpx.Client:
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    # An answer may take long to begin, a server that is there accepts at once.
    timeout = httpx.Timeout(None, connect=5)
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from None


def served_model(client: httpx.Client) -> str:
    """The name of the server's first model. Raises ``ConfigError`` where it gives none."""
    base = str(client.base_url).rstrip("/")
    try:
        response = client.get("/v1/models", timeout=_PATIENCE)
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"no server answers at {base}/v1/models ({reason})") from None
    if response.status_code == 401:
        raise ConfigError(f"{base} wants a key: --api-key, or NSA_SERVE_API_KEY in the environment")
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{base}/v1/models names no model: {_reason(response)}") from None


@contextlib.contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[str]:
    """A server process for this chat alone, on a free port; gives its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nsa_serve.server.cli", "serve", *arguments]
    # Its lines about requests would stand between the answers, on the same terminal.
    environment = {LEVEL_VARIABLE: "warning", **os.environ}
    process = subprocess.Popen(
        [*command, "--port", str(port)], start_new_session=True, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _await_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            # With a key /ready is refused, which tells as well that it listens.
            if httpx.get(f"{url}/ready").status_code in (200, 401):
                return
        time.sleep(_POLL)
    raise ConfigError(f"the server for this chat ended with code {process.returncode}")


def _lines() -> Iterator[str]:
    """Lines that a person types, until the end of input."""
    while True:
        try:
            yield input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


class Conversation:
    """The turns so far, and the way to one more. Answers are written to ``out`` as they come."""

    def __init__(
        self, client: httpx.Client, model: str, settings: ChatSettings, out: TextIO
    ) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._out = out
        self.messages = self._first_messages()

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line; a slash begins a command."""
        self._out.write(_GREETING.format(self._model))
        for line in lines:
            match line.strip():
                case "":
                    pass
                case "/quit" | "/exit":
                    return
                case "/clear":
                    self.messages = self._first_messages()
                case text if (command := _COMMAND.match(text)) is not None:
                    self._out.write(f"{command[0]} is no command. {_COMMANDS}")
                case _:
                    self._answer(line)

    def _first_messages(self) -> list[dict[str, str]]:
        system = self._settings.system
        return [{"role": "system", "content": system}] if system else []

    def _answer(self, line: str) -> None:
        """One turn. An answer that was interrupted stays as far as it came."""
        asked = [*self.messages, {"role": "user", "content": line}]
        pieces: list[str] = []
        try:
            for piece in self._stream(asked):
                pieces.append(piece)
                self._out.write(piece)
                self._out.flush()
        except KeyboardInterrupt:
            self._out.write(" …")
        except (httpx.HTTPError, ConfigError) as error:
            self._out.write(f"[{error}]\n")
            return
        self._out.write("\n")
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": True}
        for name in ("temperature", "max_tokens"):
            value = getattr(self._settings, name)
            if value is not None:
                body[name] = value
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ConfigError(_reason(response))
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield _piece(json.loads(line.removeprefix("data: ")))


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered {response.status_code}"


def _piece(chunk: dict[str, Any]) -> str:
    """The text of one event. Raises ``ConfigError`` with the server's words if it is an error."""
    if "error" in chunk:
        raise ConfigError(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
