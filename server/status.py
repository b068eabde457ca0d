"""``GET /status`` and ``GET /traces/{id}``: what the status page draws, for anybody's use."""

from __future__ import annotations

import time
from base64 import b64encode
from collections import Counter
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from .. import __version__
from ..engine.messages import EngineDescription
from ..stats import CacheMap, StatsSnapshot, TierReport
from .recent import KeptTrace, Recent
from .replies import Reply
from .services import Services

MAX_CELLS = 4096  # of the cache map; more blocks share cells
MAX_BLOCK_CHARS = 600
_MAP_PATIENCE = 0.5  # seconds that the map may take before the last one is shown
_KEPT = 255  # as in CacheMap.holders


class EngineStatus(Reply):
    """What is loaded."""

    family: str
    attention: str
    trained_sparse: bool
    dtype: str
    device: str
    num_layers: int
    page_size: int
    token_budget: int


class RequestCounts(Reply):
    running: int
    waiting: int
    rejected: int
    preemptions: int
    finished: dict[str, int]


class TokenCounts(Reply):
    """Tokens since the server started."""

    prompt: int
    cached: int
    generated: int


class CacheCounts(Reply):
    blocks: int
    in_use: int
    kept: int
    shared: int | None
    spilled: int | None
    prefix_queries: int
    prefix_hits: int


class HostTier(Reply):
    """What the pages in host memory have cost since the server started."""

    lookups: int
    hits: int
    fetched_bytes: int
    out_bytes: int
    in_bytes: int
    stall_seconds: float


class CacheCells(Reply):
    """The cache as a strip of cells in the order of block ids, a letter each.

    ``states``: ``-`` free, ``k`` kept for its content, ``u`` used by one request, ``s`` shared by
    several. ``places``: ``d`` on the device, ``h`` in host memory alone. Where a cell stands for
    several blocks it shows what most of them are.
    """

    blocks_per_cell: int
    states: str
    places: str


class FirstToken(Reply):
    """A request's time to its first token, and how long ago that was, in seconds."""

    age: float
    seconds: float


class Status(Reply):
    """The server at this moment. Rates are the reader's: counts only grow."""

    version: str
    model: str
    max_model_len: int
    state: Literal["ok", "draining"]
    now: float  # seconds, of a clock that only serves for differences
    engine: EngineStatus | None
    requests: RequestCounts
    tokens: TokenCounts
    steps: int
    cache: CacheCounts
    host_tier: HostTier | None
    cells: CacheCells | None
    first_tokens: list[FirstToken]


class TracedToken(Reply):
    position: int  # of the query that the token was sampled from
    text: str


class Trace(Reply):
    """What NSA looked at for the first tokens of an answer.

    ``selection``: base64 of int32, little-endian [tokens, layers, kv_heads, selected]: numbers of
    ``blocks``, ascending, −1 padded. ``gates``: base64 of float32 [tokens, layers, kv_heads, 3] in
    the order compressed, selected, window, or null where they are fixed at (0, 1, 0).
    """

    id: str
    page_size: int
    num_prompt_tokens: int
    layers: int
    kv_heads: int
    selected: int
    tokens: list[TracedToken]
    blocks: list[str]  # texts of the pages
    selection: str
    gates: str | None


def status_router(services: Services) -> APIRouter:
    """The routes behind the status page."""
    router = APIRouter()

    @router.get("/status", response_model=Status)
    async def status() -> Response:
        """What is loaded, how busy it is, and who holds the cache."""
        snapshot = await services.engine.stats()
        cache_map = await services.engine.cache_map(_MAP_PATIENCE)
        return _json(_status(services, snapshot, cache_map))

    @router.get("/traces/{id}", response_model=Trace)
    async def trace(id: str, choice: Annotated[int, Query(ge=0)] = 0) -> Response:
        """What NSA looked at for a completion that was sent with nsa_trace and has ended."""
        kept = services.recent.trace(f"{id}-{choice}")
        return _json(await services.workers.run(lambda: _trace(services, id, kept)))

    return router


def _json(reply: Reply) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(reply.to_json(), media_type="application/json", headers=headers)


def _status(services: Services, snapshot: StatsSnapshot, cache_map: CacheMap | None) -> Status:
    settings = services.settings
    return Status(
        version=__version__,
        model=settings.model_name,
        max_model_len=settings.max_model_len,
        state="draining" if services.admission.draining else "ok",
        now=time.monotonic(),
        engine=None if settings.engine is None else _engine(settings.engine),
        requests=RequestCounts(
            running=snapshot.num_running,
            waiting=snapshot.num_waiting,
            rejected=snapshot.num_rejected + services.admission.num_rejected,
            preemptions=snapshot.num_preemptions,
            finished=snapshot.num_finished,
        ),
        tokens=TokenCounts(
            prompt=snapshot.prompt_tokens,
            cached=snapshot.cached_tokens,
            generated=snapshot.generation_tokens,
        ),
        steps=snapshot.num_steps,
        cache=_cache(snapshot, cache_map),
        host_tier=None if snapshot.tier is None else _host_tier(snapshot.tier),
        cells=None if cache_map is None else cells_of(cache_map),
        first_tokens=_first_tokens(services.recent),
    )


def _engine(engine: EngineDescription) -> EngineStatus:
    return EngineStatus(**{name: getattr(engine, name) for name in EngineStatus.model_fields})


def _cache(snapshot: StatsSnapshot, cache_map: CacheMap | None) -> CacheCounts:
    shared = spilled = None
    if cache_map is not None:
        shared = sum(1 < count < _KEPT for count in cache_map.holders)
        spilled = len(cache_map.spilled)
    return CacheCounts(
        blocks=snapshot.num_blocks,
        in_use=snapshot.num_blocks_in_use,
        kept=snapshot.num_blocks_cached,
        shared=shared,
        spilled=spilled,
        prefix_queries=snapshot.prefix_queries,
        prefix_hits=snapshot.prefix_hits,
    )


def _host_tier(tier: TierReport) -> HostTier:
    return HostTier(**{name: getattr(tier, name) for name in HostTier.model_fields})


def _first_tokens(recent: Recent) -> list[FirstToken]:
    return [
        FirstToken(age=round(age, 3), seconds=seconds)
        for age, seconds in recent.first_tokens(time.monotonic())
    ]


def cells_of(cache_map: CacheMap) -> CacheCells:
    """The map in at most ``MAX_CELLS`` cells."""
    states = "".join(_STATES[count] for count in cache_map.holders)
    spilled = set(cache_map.spilled)
    places = "".join("h" if block in spilled else "d" for block in range(len(states)))
    width = -(-len(states) // MAX_CELLS)
    return CacheCells(
        blocks_per_cell=width, states=_folded(states, width), places=_folded(places, width)
    )


def _state(count: int) -> str:
    return {0: "-", 1: "u", _KEPT: "k"}.get(count, "s")


_STATES = [_state(count) for count in range(256)]


def _folded(letters: str, width: int) -> str:
    """One letter for each ``width`` of them: the commonest."""
    if width == 1:
        return letters
    runs = (letters[at : at + width] for at in range(0, len(letters), width))
    return "".join(Counter(run).most_common(1)[0][0] for run in runs)


def _trace(services: Services, name: str, kept: KeptTrace) -> Trace:
    """Word a trace: the texts of its blocks are made now, since few are ever looked at."""
    engine = services.settings.engine
    page = 1 if engine is None else engine.page_size
    layers, kv_heads, selected = kept.tokens[0].shape
    gates = [token.gates for token in kept.tokens if token.gates is not None]
    return Trace(
        id=name,
        page_size=page,
        num_prompt_tokens=len(kept.prompt_token_ids),
        layers=layers,
        kv_heads=kv_heads,
        selected=selected,
        tokens=[
            TracedToken(position=token.position, text=_text(services, [token.token_id]))
            for token in kept.tokens
        ],
        blocks=_block_texts(services, kept.token_ids, page),
        selection=b64encode(b"".join(token.selection for token in kept.tokens)).decode(),
        gates=b64encode(b"".join(gates)).decode() if gates else None,
    )


def _block_texts(services: Services, token_ids: list[int], page: int) -> list[str]:
    starts = range(0, len(token_ids), page)
    return [_text(services, token_ids[at : at + page])[:MAX_BLOCK_CHARS] for at in starts]


def _text(services: Services, token_ids: list[int]) -> str:
    return services.tokenizer.decode(token_ids, skip_special=False)
