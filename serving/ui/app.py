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
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraweave.errors import AdapterNotFound, CompositionError, LoraweaveError
from loraweave.hub.hub import Hub
from loraweave.serving.limits import Limits
from loraweave.serving.refusals import Refusal, refusal_of
from loraweave.serving.requests import read_body, read_request
from loraweave.serving.run import is_loopback
from loraweave.serving.ui.acts import Tell, act
from loraweave.serving.ui.catalogue import Alike, Catalogue, Listed, Named, Placed, Query, Searched
from loraweave.serving.ui.overview import Overview
from loraweave.serving.ui.workbench import Answered, Exported, Found, Mixed, Picked, Routed, Saved, Workbench

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
# the page of an explanation, whose own policy names its script by its hash; it is shown in a frame of the page
EXPLANATION = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'self'"
}
# threads that read the hub; a first search, which makes the embeddings, holds one of them
NUM_READERS = 4


def make_ui_server(
    hub: Hub,
    load: Callable[[], tuple[Any, Any]],
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    limits: Limits | None = None,
    log_level: str = "info",
) -> uvicorn.Server:
    """A server of the page over a hub; its `run()` answers until an interruption, or until `should_exit` is set.

    `load` gives (model, tokenizer) when something is first tried on the base model. Raises CompositionError for an address
    that other machines reach: the page has no key, and saves into the hub.
    """
    if not is_loopback(host):
        raise CompositionError(
            f"other machines reach {host!r}, and the page has no key: keep 127.0.0.1, and come from another machine through "
            f"ssh -L {port}:127.0.0.1:{port}"
        )
    app = make_ui(hub, load, limits=limits)
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, log_level=log_level, access_log=False, ws="none", timeout_graceful_shutdown=1
        )
    )


def make_ui(hub: Hub, load: Callable[[], tuple[Any, Any]], *, limits: Limits | None = None) -> Starlette:
    """An ASGI application: the page, and what it asks."""
    allowed = limits or Limits()
    overview = Overview(hub)
    catalogue, bench = Catalogue(hub, overview), Workbench(hub, load)
    readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="loraweave-ui")
    # the model is used by one at a time
    modeller = ThreadPoolExecutor(1, thread_name_prefix="loraweave-model")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for threads in (readers, modeller):
                threads.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(overview.close)

    def question(path: str, kind: type[Asked], answer: Callable[[Asked], dict[str, Any]]) -> Route:
        """A question in an address."""

        async def handle(request: Request) -> Response:
            asked = read_request(kind, request.query_params)
            found = await asyncio.get_running_loop().run_in_executor(readers, answer, asked)
            return JSONResponse(found)

        return Route(f"/api/{path}", _telling(handle), methods=["GET"])

    def posted(path: str, kind: type[Asked], answer: Callable[[Asked], dict[str, Any]]) -> Route:
        """A question in a body."""

        async def handle(request: Request) -> Response:
            asked = read_request(kind, await read_body(request, allowed))
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(readers, answer, asked))

        return Route(f"/api/{path}", _telling(handle), methods=["POST"])

    def acted(path: str, kind: type[Asked], work: Callable[[Asked, Tell], None]) -> Route:
        """A long act on the model, which tells as it goes on."""

        async def handle(request: Request) -> Response:
            asked = read_request(kind, await read_body(request, allowed))
            return act(modeller, lambda tell: work(asked, tell), refusal)

        return Route(f"/api/{path}", _telling(handle), methods=["POST"])

    async def export(request: Request) -> Response:
        asked = read_request(Exported, await read_body(request, allowed))
        path = await asyncio.get_running_loop().run_in_executor(modeller, bench.export, asked)
        return FileResponse(path, media_type="application/zip", background=BackgroundTask(path.unlink))

    async def explanation(request: Request) -> Response:
        return HTMLResponse(bench.explanation(request.path_params["number"]), headers=EXPLANATION)

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
        question("choices", Query, lambda asked: bench.choices()),
        posted("picked", Picked, bench.picked),
        posted("mixed", Mixed, bench.mixed),
        acted("answer", Answered, bench.answer),
        acted("find", Found, bench.find),
        acted("save", Saved, bench.save),
        acted("route", Routed, bench.route),
        Route("/api/export", _telling(export), methods=["POST"]),
        Route("/explanation/{number}", _telling(explanation), methods=["GET"]),
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


def refusal(error: BaseException) -> Refusal:
    """What the person at the page reads: errors of the library whole, others by their kind; the log has their cause."""
    if not isinstance(error, LoraweaveError):
        return refusal_of(error)
    return Refusal(404 if isinstance(error, AdapterNotFound) else 400, str(error), code=type(error).__name__)


def told(error: BaseException) -> Response:
    found = refusal(error)
    return JSONResponse(found.body, found.status, headers=found.headers)


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
