"""One model under evaluation, asked in process and through the server's own routes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.testclient import TestClient

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.evaluate.in_process import InProcess
from nsa_serve.evaluate.over_http import OverHTTP, ServerAddress
from nsa_serve.evaluate.subject import Subject
from nsa_serve.server.app import create_app
from nsa_serve.server.settings import ServerSettings
from tests.in_process import InProcessEngine

ADDRESS = ServerAddress("http://test/v1", concurrency=1)


@contextmanager
def asked_both_ways(config: EngineConfig) -> Iterator[dict[str, Subject]]:
    """The model of bytes that ``config`` names, with a context of ``config``'s length."""
    engine = Engine.from_config(config)
    assert engine.tokenizer is not None
    assert config.source.max_model_len is not None
    settings = ServerSettings(
        model_names=("bytes",), max_model_len=config.source.max_model_len, vocab_size=256
    )
    app = create_app(InProcessEngine(engine), engine.tokenizer, settings)
    with TestClient(app, base_url="http://test") as client:
        yield {
            "http": OverHTTP(ADDRESS, client),
            "in process": InProcess.load(config),
        }
