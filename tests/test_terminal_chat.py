"""``nsa-serve chat``: a conversation over scripted answers, and servers that can't be talked to."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from functools import partial
from io import StringIO

import httpx
import pytest
from typer.testing import CliRunner

from nsa_serve.errors import ConfigError
from nsa_serve.server import cli
from nsa_serve.server.terminal_chat import ChatSettings, Conversation

chat_room = importlib.import_module("nsa_serve.server.terminal_chat")


def _answer(request):
    asked = json.loads(request.content)
    assert asked["model"] == "m"
    if asked["messages"][-1]["content"] == "fail":
        return httpx.Response(400, json={"error": {"message": "too long"}})
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
    if asked["messages"][-1]["content"] == "break":
        pieces.append({"error": {"message": "the engine has stopped"}})
    lines = [f"data: {json.dumps(piece)}" for piece in pieces]
    return httpx.Response(200, text="\n\n".join([*lines, ": keep-alive", "data: [DONE]", ""]))


def converse(*lines, **settings):
    out = StringIO()
    transport = httpx.MockTransport(_answer)
    with httpx.Client(transport=transport, base_url="http://server") as client:
        talk = Conversation(client, "m", ChatSettings(**settings), out)
        talk.run(iter(lines))
    return out.getvalue(), talk.messages


def test_a_conversation_keeps_its_turns():
    text, messages = converse("hi", "again", system="Be brief.")
    assert text.count("Hello\n") == 2
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_clear_forgets_and_quit_ends():
    text, messages = converse("hi", "/clear", "/quit", "never")
    assert text.count("Hello") == 1
    assert messages == []


@pytest.mark.parametrize(
    ("line", "reason"), [("fail", "too long"), ("break", "the engine has stopped")]
)
def test_an_error_is_shown_and_its_turn_forgotten(line, reason):
    text, messages = converse(line, "hi")
    assert f"[{reason}]" in text
    assert [message["content"] for message in messages] == ["hi", "Hello"]


@pytest.mark.parametrize("line", ["/help", "/exit now", "/", "/Clear", "/?"])
def test_a_command_that_nobody_knows_is_answered_with_those_there_are(line):
    text, messages = converse(line)
    assert f"{line.split()[0]} is no command" in text
    assert "/clear" in text.partition("is no command")[2]
    assert messages == []


def test_a_message_may_begin_with_a_path():
    _, messages = converse("/etc/fstab is what?")
    assert [message["content"] for message in messages] == ["/etc/fstab is what?", "Hello"]


def test_the_server_of_a_chat_does_not_write_between_its_answers(monkeypatch):
    """What it logs of requests would."""
    program = "import os, sys; sys.exit(os.environ['NSA_SERVE_LOG_LEVEL'] != 'warning')"
    started = []

    def popen(command, **options):
        started.append(command[-1])
        return subprocess.Popen([sys.executable, "-c", program], **options)

    monkeypatch.delenv("NSA_SERVE_LOG_LEVEL", raising=False)
    monkeypatch.setattr(chat_room, "subprocess", types.SimpleNamespace(Popen=popen))
    with pytest.raises(ConfigError, match="ended with code 0"), chat_room.own_server([]):
        pass
    assert len(started) == 1


@pytest.fixture
def chat_at(monkeypatch):
    """Runs ``chat --url`` against a function from requests to responses; nothing is typed."""
    monkeypatch.setattr(chat_room, "_lines", lambda: iter(()))

    def run(answer, *arguments, url="http://x/v1"):
        client = partial(httpx.Client, transport=httpx.MockTransport(answer))
        monkeypatch.setattr(chat_room.httpx, "Client", client)
        return CliRunner().invoke(cli.app, ["chat", "--url", url, *arguments])

    return run


def test_a_chat_with_a_url_starts_no_server_and_greets_with_the_name_of_the_model(chat_at):
    asked = []

    def answer(request):
        asked.append((str(request.url), request.headers["authorization"]))
        return httpx.Response(200, json={"data": [{"id": "llama"}, {"id": "other"}]})

    found = chat_at(answer, "--api-key", "k", url="http://x/behind/v1/")
    assert found.exit_code == 0
    assert found.stdout.startswith("llama is listening.")
    assert asked == [("http://x/behind/v1/models", "Bearer k")]
    refused = chat_at(answer, "--attention", "nsa")
    assert refused.exit_code == 2
    assert "--attention nsa" in refused.stderr


def _unreachable(request):
    raise httpx.ConnectError("Connection refused")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_unreachable, "no server answers at http://x/v1/models (Connection refused)"),
        (lambda _: httpx.Response(401, json={"error": {}}), "http://x wants a key: --api-key"),
        (lambda _: httpx.Response(404, text="?"), "names no model: the server answered 404"),
        (lambda _: httpx.Response(200, text="<html>"), "names no model: the server answered 200"),
        (lambda _: httpx.Response(200, json={"data": []}), "names no model"),
    ],
)
def test_a_chat_whose_server_can_not_be_talked_to_ends_before_it_greets(chat_at, answer, reason):
    found = chat_at(answer)
    assert (found.exit_code, found.stdout) == (2, "")
    assert reason in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_chat_with_an_address_that_is_none_is_refused(chat_at):
    found = chat_at(_unreachable, url="http://x:port/v1")
    assert found.exit_code == 2
    assert "--url http://x:port/v1: Invalid port" in found.stderr
