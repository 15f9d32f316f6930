"""The page's server: its files, JSON routes, and guards against other pages in the browser.

It answers on loopback and only under a loopback name, so that no other host name can be pointed at this machine (DNS
rebinding); a request that changes something is JSON from this page alone; and the page's own policy lets nothing in or out
but this server.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraweave import AdapterNotFound, Hub, LoraweaveError
from loraweave.extend.serving import (
    EventStream,
    Limits,
    Refusal,
    loopback_only,
    read_body,
    read_request,
    refusal_of,
    refused,
    require_loopback,
    unless_gone,
)
from loraweave.extensions.ui.catalogue import Alike, Catalogue, Listed, Named, Placed, Query, Searched
from loraweave.extensions.ui.overview import Overview
from loraweave.extensions.ui.workbench import (
    Answered,
    Copied,
    Exported,
    Found,
    Mixed,
    Picked,
    Routed,
    Saved,
    Tell,
    Workbench,
)

Asked = TypeVar("Asked", bound=BaseModel)

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
    log_level: str = "info",
    base: str | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> uvicorn.Server:
    """Make a server of the page over a hub; its `run()` answers until an interruption, or until `should_exit` is set.

    `load` gives (model, tokenizer) when something is first tried on the base model; `base` is that model's name in the texts
    that the page offers to copy, None for the default. `ready` is called with the address once the server answers. Raises
    CompositionError for an address that other machines reach: the page has no key, and saves into the hub.
    """
    require_loopback(
        host, f"the page has no key: keep 127.0.0.1, and come from another machine through ssh -L {port}:127.0.0.1:{port}"
    )
    settings: dict[str, Any] = {"log_level": log_level, "access_log": False, "ws": "none", "timeout_graceful_shutdown": 1}
    return Announced(uvicorn.Config(make_ui(hub, load, base=base), host=host, port=port, **settings), ready)


class Announced(uvicorn.Server):
    """A server that calls `ready` with its address once it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/")


def make_ui(hub: Hub, load: Callable[[], tuple[Any, Any]], *, base: str | None = None) -> Starlette:
    """Make an ASGI application that serves the page and its JSON routes."""
    overview = Overview(hub)
    catalogue, bench, threads = Catalogue(hub, overview), Workbench(hub, load, base), Threads()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            threads.close()
            await asyncio.to_thread(overview.close)

    async def explanation(request: Request) -> Response:
        return HTMLResponse(bench.explanation(request.path_params["number"]), headers=EXPLANATION)

    routes = [
        threads.question("hub", Query, lambda asked: catalogue.summary()),
        threads.question("adapters", Listed, catalogue.listed),
        threads.question("search", Searched, catalogue.searched),
        threads.question("scores", Searched, catalogue.scores),
        threads.question("map", Query, lambda asked: catalogue.points()),
        threads.question("point", Placed, catalogue.point),
        threads.question("adapter", Named, catalogue.adapter),
        threads.question("layers", Named, catalogue.layers),
        threads.question("alike", Alike, catalogue.alike),
        threads.question("choices", Query, lambda asked: bench.choices()),
        threads.question("picked", Picked, bench.picked, method="POST"),
        threads.question("mixed", Mixed, bench.mixed, method="POST"),
        threads.question("copied", Copied, bench.copied, method="POST"),
        threads.act("answer", Answered, bench.answer),
        threads.act("find", Found, bench.find),
        threads.act("save", Saved, bench.save),
        threads.act("route", Routed, bench.route),
        threads.download("export", Exported, bench.export),
        Route("/explanation/{number}", _telling(explanation), methods=["GET"]),
        Mount("/", StaticFiles(packages=[("loraweave.extensions.ui", "page_files")], html=True)),
    ]
    middleware = [Middleware(Guard), Middleware(loopback_only)]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _no_route})


class Threads:
    """A maker of routes whose work runs in threads: several that read the hub, and one that owns the model."""

    def __init__(self) -> None:
        self._limits = Limits()
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="loraweave-ui")
        self._modeller = ThreadPoolExecutor(1, thread_name_prefix="loraweave-model")

    def close(self) -> None:
        for threads in (self._readers, self._modeller):
            threads.shutdown(wait=False, cancel_futures=True)

    def question(
        self, path: str, kind: type[Asked], answer: Callable[[Asked], dict[str, Any]], method: str = "GET"
    ) -> Route:
        """Make the route of a question about the hub, whose fields are in the query string, or in the body of a POST."""

        async def handle(request: Request) -> Response:
            fields = read_request(kind, request.query_params) if method == "GET" else await self._read(kind, request)
            # a question whose client has gone before its turn, as after each typed letter, is not answered
            running = asyncio.get_running_loop().run_in_executor(self._readers, answer, fields)
            return JSONResponse(await unless_gone(request.receive, running))

        return Route(f"/api/{path}", _telling(handle), methods=[method])

    def act(self, path: str, kind: type[Asked], work: Callable[[Asked, Tell], None]) -> Route:
        """Make the route of long work on the model, which streams events while it runs."""

        async def handle(request: Request) -> Response:
            fields = await self._read(kind, request)
            return act(self._modeller, lambda tell: work(fields, tell))

        return Route(f"/api/{path}", _telling(handle), methods=["POST"])

    def download(self, path: str, kind: type[Asked], make: Callable[[Asked], Path]) -> Route:
        """Make the route of a zip file, which is deleted once it is sent."""

        async def handle(request: Request) -> Response:
            fields = await self._read(kind, request)
            made = await asyncio.get_running_loop().run_in_executor(self._modeller, make, fields)
            return FileResponse(made, media_type="application/zip", background=BackgroundTask(made.unlink))

        return Route(f"/api/{path}", _telling(handle), methods=["POST"])

    async def _read(self, kind: type[Asked], request: Request) -> Asked:
        return read_request(kind, await read_body(request, self._limits))


class Left(BaseException):
    """Raised in work whose client has gone. A BaseException, so that no `except Exception` takes it for a failure."""


def act(thread: Executor, work: Callable[[Tell], None]) -> EventStream:
    """Return a stream of the events that `work(tell)` tells; once the client has gone, `tell` raises Left in the work.

    An error of the work is the last event, a `refusal`. The work of one thread runs in order; work whose client has gone
    before its turn does nothing.
    """
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    left = threading.Event()

    def put(event: dict[str, Any] | None) -> None:
        # a loop that is closed has no client left
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(heard.put_nowait, event)

    def tell(event: dict[str, Any]) -> None:
        if left.is_set():
            raise Left
        put(event)

    def run() -> None:
        try:
            tell({})
            work(tell)
        except Left:
            pass
        except Exception as error:
            put(refusal(error).body)
        finally:
            put(None)

    async def events() -> AsyncIterator[str]:
        while (event := await heard.get()) is not None:
            yield json.dumps(event)

    thread.submit(run)
    return EventStream(events(), left.set, {})


class Guard:
    """A middleware that refuses requests from other pages, and sets the page's content policy on every answer."""

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
        same_origin = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        # a link from elsewhere opens the page, and nothing else
        if same_origin or (request.url.path, request.method) == ("/", "GET"):
            await self._app(scope, receive, guarded)
        else:
            await refused(Refusal(403, "another page asks, and only this server's own page may"))(scope, receive, guarded)


def refusal(error: BaseException) -> Refusal:
    """Return the error as the page shows it: a library error with its text, any other generic, with the cause in the log."""
    if not isinstance(error, LoraweaveError):
        return refusal_of(error)
    return Refusal(404 if isinstance(error, AdapterNotFound) else 400, str(error), code=type(error).__name__)


def _telling(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler wrapped so that its errors become HTTP answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handle(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return refused(refusal(error))

    return answer


async def _no_route(request: Request, error: Any) -> Response:
    return refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
