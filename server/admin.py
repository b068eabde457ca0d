"""The routes beside the completions: models, health, versions, tokens and metrics."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .. import __version__
from . import replies
from .logprobs import TokenTexts
from .prometheus import CONTENT_TYPE
from .schemas import DetokenizeRequest, TokenizeRequest
from .services import Services


def admin_router(services: Services) -> APIRouter:
    """Routes that clients, probes and dashboards ask."""
    router = APIRouter()
    _add_models(router, services)
    _add_probes(router, services)
    _add_tokens(router, services)
    return router


def _add_models(router: APIRouter, services: Services) -> None:
    started = int(time.time())

    @router.get("/v1/models", response_model=replies.ModelList)
    async def models() -> Response:
        """The names under which the model is served."""
        names = services.settings.model_names
        cards = [_card(services, name, started) for name in names]
        return _json(replies.ModelList(object="list", data=cards))

    @router.get("/v1/models/{name:path}", response_model=replies.ModelCard)
    async def model(name: str) -> Response:
        """One model, by name."""
        services.prompts.check_model(name)
        return _json(_card(services, name, started))

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        """The version of this server."""
        return {"version": __version__}


def _card(services: Services, name: str, created: int) -> replies.ModelCard:
    return replies.ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by="nsa-serve",
        root=name,
        parent=None,
        max_model_len=services.settings.max_model_len,
    )


def _add_probes(router: APIRouter, services: Services) -> None:
    @router.get("/health")
    async def health() -> Response:
        """Whether the engine's loop turns: it steps, or does nothing on being asked."""
        return _probe(await services.watchdog.state())

    @router.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        draining = services.admission.draining
        return _probe("draining" if draining else await services.watchdog.state())

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text form."""
        snapshot = await services.engine.stats()
        page = services.metrics.page(snapshot, services.admission.num_rejected)
        return Response(page, media_type=CONTENT_TYPE)


def _probe(state: str) -> Response:
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


def _add_tokens(router: APIRouter, services: Services) -> None:
    @router.post("/tokenize", response_model=replies.TokenizeReply)
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of a conversation."""
        return _json(
            await services.read(request, TokenizeRequest, lambda r: _tokenize(services, r))
        )

    @router.post("/detokenize", response_model=replies.DetokenizeReply)
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return _json(
            await services.read(request, DetokenizeRequest, lambda r: _detokenize(services, r))
        )


def _tokenize(services: Services, asked: TokenizeRequest) -> replies.TokenizeReply:
    services.prompts.check_model(asked.model)
    token_ids = _asked_tokens(services, asked)
    texts = TokenTexts(services.tokenizer)
    return replies.TokenizeReply(
        count=len(token_ids),
        max_model_len=services.settings.max_model_len,
        tokens=token_ids,
        token_strs=[texts.replaced(i) for i in token_ids] if asked.return_token_strs else None,
    )


def _asked_tokens(services: Services, asked: TokenizeRequest) -> list[int]:
    if asked.messages is None:
        add_special = asked.add_special_tokens is not False
        return services.tokenizer.encode(asked.prompt or "", add_special=add_special)
    text = services.prompts.render(
        asked.messages,
        asked.tools or (),
        add_generation_prompt=asked.add_generation_prompt is not False,
        arguments=asked.chat_template_kwargs,
    )
    return services.prompts.encode(text, add_special=False, param="messages")


def _detokenize(services: Services, asked: DetokenizeRequest) -> replies.DetokenizeReply:
    services.prompts.check_model(asked.model)
    services.prompts.check_ids(asked.tokens, "tokens")
    text = services.tokenizer.decode(asked.tokens, skip_special=False)
    return replies.DetokenizeReply(prompt=text)


def _json(reply: replies.Reply) -> Response:
    return Response(reply.to_json(), media_type="application/json")
