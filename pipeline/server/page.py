"""The pages at `/` and `/docs`, which reach nothing but this server."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from pipeline.server.reference import reference_page

_FOLDER = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/masks.js": ("masks.js", "text/javascript"),
}
PATHS = (*_FILES, "/docs")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Serve the pages of an app that is else complete. They hold no secret, so they need no token;
    their requests do.
    """
    for path, (name, media_type) in _FILES.items():
        _add_file(app, path, (_FOLDER / name).read_bytes(), media_type)
    _add_file(app, "/docs", reference_page(app.openapi()).encode(), "text/html")


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)
