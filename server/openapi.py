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


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = [(model, "validation") for model in _BODIES.values()]
    _, schemas = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, model in _BODIES.items():
        document["paths"][path]["post"]["requestBody"] = _body(model.__name__)
    return document


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=name)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}
