"""The status page at ``/``: static files, which know nothing and so need no key."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_FILES = {
    "/": FOLDER / "index.html",
    **{
        f"/static/{path.name}": path
        for path in sorted(FOLDER.iterdir())
        if path.suffix in (".css", ".js")
    },
}
# Nothing from elsewhere, nothing inline, no frame around it.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route for each file, read once."""
    return [_route(address, path) for address, path in PAGE_FILES.items()]


def _route(address: str, path: Path) -> Route:
    content = path.read_bytes()
    media_type = _TYPES[path.suffix]

    async def show(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(address, show, methods=["GET"], include_in_schema=False)
