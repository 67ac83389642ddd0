"""The page at / and its files: what the package's folder `page` contains.

The files have the digest of their content in their path, so a browser may keep them for good. `index.html` names that
path and is asked for each time. All paths are relative, so the page works behind a proxy that adds a prefix.

Called by: `app.py`, unless the setting `page` is off. Calls: no other module.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from slatewise.errors import NotFound

FOLDER = Path(__file__).parents[1] / "page"
INDEX = "index.html"
PLACEHOLDER = "{files}"  # in index.html: the path of the other files
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Only this server's own files and answers; no inline script, no text as HTML (Trusted Types).
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """Read the files, and return the routes that serve them from memory."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    digest = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()[:16]
    index = files.pop(INDEX).replace(PLACEHOLDER.encode(), f"page/{digest}".encode())
    tag = f'"{digest}"'
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def show_page(request: Request) -> Response:
        headers = HEADERS | {"Cache-Control": "no-cache", "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(index, headers=headers, media_type=TYPES[".html"])

    @routes.get("/page/{version}/{name}")
    async def show_file(version: str, name: str) -> Response:
        if version != digest or name not in files:
            raise NotFound("no such path")
        headers = HEADERS | {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(files[name], headers=headers, media_type=TYPES[Path(name).suffix])

    return routes
