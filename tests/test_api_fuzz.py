"""The API against its own description, and against bytes that nobody would send on purpose."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance

from nsa_serve.engine.messages import (
    Abort,
    Ping,
    Submit,
    Unreadable,
    command_decoder,
    encoder,
    event_decoder,
)
from nsa_serve.engine.process import _read
from nsa_serve.errors import InvalidParameter, TemplateError
from nsa_serve.server.app import create_app
from nsa_serve.server.body import parse
from nsa_serve.server.schemas import ChatCompletionRequest, CompletionRequest
from nsa_serve.server.settings import ServerSettings
from nsa_serve.tokenizer import ChatTemplate
from tests.scripted_engine import make_request
from tests.server_fakes import MODEL, VOCAB, ByteTokenizer, FakeEngine

ERROR = {"message", "type", "param", "code"}


@contextlib.asynccontextmanager
async def stays_open(app):
    yield


@pytest.fixture(scope="module")
def api():
    known = ServerSettings(model_names=(MODEL,), max_model_len=1000, vocab_size=VOCAB)
    app = create_app(FakeEngine(), ByteTokenizer(), known)
    # Every call would end the app's life after it.
    app.router.lifespan_context = stays_open
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    app.state.services.workers.close()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_description_allows_or_forbids_never_makes_a_500(api, mode):
    operations = [result.ok() for result in api.get_all_operations()]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for operation in operations])

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(cases)
    def answered(case):
        response = case.call()
        assert response.status_code < 500, case.as_curl_command()
        if response.status_code >= 400:
            assert set(response.json()["error"]) == ERROR
        if response.status_code == 200 and mode.is_positive and "/v1/" in case.path:
            case.validate_response(response, checks=[response_schema_conformance])

    answered()
    health = next(op for op in operations if op.path == "/health").Case().call()
    assert health.status_code == 200


NAMES = st.sampled_from(["messages", "prompt", "tools", "n", "stop", "seed", "stream", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken_json(draw):
    """JSON of a request, a few of whose bytes are others."""
    body = bytearray(msgspec.json.encode(draw(st.dictionaries(NAMES, JSON, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


@settings(max_examples=100)
@given(broken_json() | st.binary(max_size=64))
@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest])
def test_a_body_is_a_request_or_an_error_with_a_bounded_message(model, body):
    message = ""
    try:
        assert isinstance(parse(model, body), model)
    except InvalidParameter as error:
        message = str(error)
    assert len(message) < 6000


@st.composite
def broken_message(draw):
    """A command of the wire, a few of whose bytes are others, or cut short."""
    request = make_request(draw(st.text(max_size=4)), draw(st.lists(st.integers(0, 9), max_size=4)))
    command = draw(st.sampled_from([Submit(request), Abort("a"), Ping()]))
    payload = bytearray(encoder.encode(command))
    for _ in range(draw(st.integers(0, 3))):
        payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return bytes(payload[: draw(st.integers(0, len(payload)))])


@settings(max_examples=150)
@given(st.binary(max_size=8), broken_message() | st.binary(max_size=64))
def test_a_message_is_a_command_or_unreadable_and_never_a_crash(topic, payload):
    command = _read(topic, payload)
    if isinstance(command, Unreadable):
        assert command.message
    else:
        assert command_decoder.decode(encoder.encode(command)) == command


@settings(max_examples=100)
@given(st.binary(max_size=64))
def test_an_event_that_can_not_be_read_is_an_error_of_the_decoder(payload):
    event = None
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        event = event_decoder.decode(payload)
    assert event is None or event_decoder.decode(encoder.encode(event)) == event


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ style }}"
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(["role", "content", "tool_calls", "name", "__class__", "{{ 7 * 7 }}"])


@settings(max_examples=50)
@given(
    st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=3),
    st.none() | st.lists(st.dictionaries(st.text(max_size=4), VALUES), max_size=2),
    VALUES,
)
def test_a_template_renders_whatever_it_is_given_or_says_why_not(messages, tools, style):
    template = ChatTemplate({"default": TEMPLATE}, {})
    text = ""
    with contextlib.suppress(TemplateError):
        text = template.render(messages, tools=tools, style=style)
    assert "49" not in text or "49" in str((messages, tools, style))


def test_values_are_never_templates_themselves():
    template = ChatTemplate({"default": TEMPLATE}, {})
    sly = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}"
    assert template.render([{"role": "user", "content": sly}]) == f"<user>{sly}"
