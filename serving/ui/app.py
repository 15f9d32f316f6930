"""The page's server: its files, its questions as JSON, and what a browser must not be talked into.

It answers on loopback and only under a loopback name, so that no other page's name can be bent to this machine (DNS
rebinding); a question that changes something is JSON from this page alone; and the page's own policy lets nothing in or out
but this server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraweave.errors import AdapterNotFound, CompositionError, LoraweaveError
from loraweave.hub.hub import Hub
from loraweave.serving.limits import Limits
from loraweave.serving.refusals import Refusal, refusal_of
from loraweave.serving.requests import read_request
from loraweave.serving.run import is_loopback
from loraweave.serving.ui.catalogue import Alike, Catalogue, Listed, Named, Placed, Query, Searched
from loraweave.serving.ui.overview import Overview

Asked = TypeVar("Asked", bound=BaseModel)

HOSTS = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# threads that read the hub; a first search, which makes the embeddings, holds one of them
NUM_READERS = 4


def make_ui_server(
    hub: Hub, *, host: str = "127.0.0.1", port: int = 8001, limits: Limits | None = None, log_level: str = "info"
) -> uvicorn.Server:
    """A server of the page over a hub; its `run()` answers until an interruption, or until `should_exit` is set.

    Raises CompositionError for an address that other machines reach: the page has no key, and saves into the hub.
    """
    if not is_loopback(host):
        raise CompositionError(
            f"other machines reach {host!r}, and the page has no key: keep 127.0.0.1, and come from another machine through "
            f"ssh -L {port}:127.0.0.1:{port}"
        )
    app = make_ui(hub, limits=limits)
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, log_level=log_level, access_log=False, ws="none", timeout_graceful_shutdown=1
        )
    )


def make_ui(hub: Hub, *, limits: Limits | None = None) -> Starlette:
    """An ASGI application: the page, and what it asks."""
    overview = Overview(hub)
    catalogue = Catalogue(hub, overview)
    readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="loraweave-ui")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(overview.close)

    def question(path: str, kind: type[Asked], answer: Callable[[Asked], dict[str, Any]]) -> Route:
        """A question in an address."""

        async def handle(request: Request) -> Response:
            asked = read_request(kind, request.query_params)
            found = await asyncio.get_running_loop().run_in_executor(readers, answer, asked)
            return JSONResponse(found)

        return Route(f"/api/{path}", _telling(handle), methods=["GET"])

    routes = [
        question("hub", Query, lambda asked: catalogue.summary()),
        question("adapters", Listed, catalogue.listed),
        question("search", Searched, catalogue.searched),
        question("scores", Searched, catalogue.scores),
        question("map", Query, lambda asked: catalogue.points()),
        question("point", Placed, catalogue.point),
        question("adapter", Named, catalogue.adapter),
        question("layers", Named, catalogue.layers),
        question("alike", Alike, catalogue.alike),
        Route("/base.css", _base_style, methods=["GET"]),
        Mount("/", StaticFiles(packages=[("loraweave.serving.ui", "page_files")], html=True)),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        Middleware(Guard),
    ]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _no_route})


class Guard:
    """Refuses what another page sends, and gives every answer the page's policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        own = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        # a link from elsewhere opens the page, and nothing else
        if own or (request.url.path, request.method) == ("/", "GET"):
            await self._app(scope, receive, guarded)
        else:
            await told(Refusal(403, "another page asks, and only this server's own page may"))(scope, receive, guarded)


def told(error: BaseException) -> Response:
    """What the person at the page reads: errors of the library whole, others by their kind; the log has their cause."""
    refusal = refusal_of(error) if not isinstance(error, LoraweaveError) else None
    if refusal is None:
        status = 404 if isinstance(error, AdapterNotFound) else 400
        refusal = Refusal(status, str(error), code=type(error).__name__)
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


def _telling(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler whose errors become answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handle(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return told(error)

    return answer


async def _base_style(request: Request) -> Response:
    return FileResponse(str(resources.files("loraweave.composer.explain") / "page_files" / "base.css"))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return told(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
