"""The API's description at /openapi.json, with the bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from .responses.schemas import ResponsesRequest
from .schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REF = "#/components/schemas/{model}"
_BODIES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_PROBES = ("/health", "/ready")
_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = [(model, "validation") for model in _BODIES.values()]
    _, schemas = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, model in _BODIES.items():
        document["paths"][path]["post"]["requestBody"] = _body(model.__name__)
    document["components"]["schemas"]["Error"] = _ERROR
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _describe_answers(path, operation["responses"])
    return document


def _describe_answers(path: str, responses: dict[str, Any]) -> None:
    """Errors, all of one form, and answers that are no JSON."""
    # FastAPI's own form of errors, which is never sent.
    responses.pop("422", None)
    responses["default"] = _answer("An error", "application/json", _REF.format(model="Error"))
    if path in _STREAMED:
        responses["200"]["content"]["text/event-stream"] = {}
    if path in _PROBES:
        responses["503"] = {"description": "Not now: frozen, dead or draining"}
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}


def _answer(description: str, kind: str, ref: str) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": {"$ref": ref}}}}


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=name)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}
