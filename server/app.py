"""The application: routes, what stands before them, and how errors are answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import NSAServeError
from .admin import admin_router
from .chat import chat_router
from .completions import completions_router
from .errors import answer_error, answer_http_error, answer_invalid_query
from .middleware import APIKeyGuard, BodyLimit, LastResort
from .openapi import describe
from .page import page_routes
from .ports import Engine, Tokenizer
from .request_log import RequestLog, Tracing
from .responses.route import responses_router
from .services import Services
from .settings import ServerSettings
from .status import status_router


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The server as an ASGI application; ``app.state.services`` has its parts."""
    services = Services.build(engine, tokenizer, settings)
    app = FastAPI(
        title="nsa-serve", version=__version__, docs_url=None, redoc_url=None,
        lifespan=_lifespan,
    )  # fmt: skip
    app.state.services = services
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    for router in (
        chat_router,
        completions_router,
        responses_router,
        admin_router,
        status_router,
    ):
        app.include_router(router(services))
    app.router.routes.extend(page_routes())
    app.add_exception_handler(NSAServeError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid_query)
    _add_guards(app, settings)
    app.add_middleware(RequestLog, tracing=tracing)
    return app


def _add_guards(app: FastAPI, settings: ServerSettings) -> None:
    """What every request passes; the last one added is the first passed."""
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(APIKeyGuard, keys=settings.api_keys)
    if settings.allowed_origins:
        # Outside the key: a browser's preflight request carries none.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(LastResort)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.services.workers.close()
