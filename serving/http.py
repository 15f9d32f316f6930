"""The parts that HTTP applications over models share: reading requests, streams of events, refusals, and loopback checks."""

import asyncio
import ipaddress
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loraweave.errors import CompositionError
from loraweave.serving.limits import CURRENT_REQUEST, Limits, Refusal, refusal_of

T = TypeVar("T")
Kind = TypeVar("Kind", bound=BaseModel)

# under other names a page elsewhere could be bent to this machine (DNS rebinding)
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
# a client's own id of a request, which is sent back; another is replaced
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def request_id(sent: str = "") -> str:
    """Return the id of a request that sent this one, or one made for it; the log tells errors of this context with it."""
    known = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    CURRENT_REQUEST.set(known)
    return known


def require_loopback(host: str, way_out: str) -> None:
    """Raise CompositionError, whose text ends with `way_out`, if other machines reach the address `host`."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        raise CompositionError(f"other machines reach {host!r}, and {way_out}")


def loopback_only(app: ASGIApp) -> ASGIApp:
    """Return the application, wrapped to refuse, in OpenAI's form, requests to other host names than those of loopback."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        trusted: list[Scope] = []

        async def trust(scope: Scope, receive: Receive, send: Send) -> None:
            trusted.append(scope)

        async def drop(message: Any) -> None:
            """Send nothing: the middleware's own refusal is plain text."""

        await TrustedHostMiddleware(trust, LOOPBACK_NAMES, www_redirect=False)(scope, receive, drop)
        foreign = Refusal(400, "the Host header names another machine than this one, which serves loopback names alone")
        number = "" if trusted else request_id(Headers(scope=scope).get("x-request-id", ""))
        await (app if trusted else refused(foreign, number))(scope, receive, send)

    return answer


class Bodies:
    """The bodies being read; if they exceed `most` bytes together, the one that began first is dropped."""

    def __init__(self, most: int) -> None:
        self._most = most
        # of all bodies that are being read, and of each
        self.num_bytes = 0
        self._reading: dict[asyncio.Timeout, int] = {}

    def add(self, timer: asyncio.Timeout, num_bytes: int) -> None:
        """Count more bytes of the body that is read until `timer` ends."""
        self._reading[timer] = self._reading.get(timer, 0) + num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._most:
            first = next(iter(self._reading))
            self.end(first)
            # its time may just be up
            with suppress(RuntimeError):
                first.reschedule(0)

    def end(self, timer: asyncio.Timeout) -> None:
        """Count a body no longer."""
        self.num_bytes -= self._reading.pop(timer, 0)


async def read_body(request: Request, limits: Limits, bodies: Bodies | None = None) -> bytes:
    """Return the request's body, counted among `bodies` while it is read.

    Raises Refusal if the body is too large, comes too late, or is not declared as JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the body's Content-Type is {kind!r}; send application/json")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise Refusal(413, f"the body has {declared[:20]} bytes, and at most {limits.body_bytes} are read")
    body, bodies = bytearray(), bodies or Bodies(limits.body_bytes)
    try:
        async with asyncio.timeout(min(limits.seconds, limits.body_seconds)) as timer:
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise Refusal(413, f"the body has more than {limits.body_bytes} bytes")
                bodies.add(timer, len(part))
    except TimeoutError as error:
        raise Refusal(408, "the body came too slowly: it had no more time, or others needed its memory") from error
    finally:
        bodies.end(timer)
    return bytes(body)


def read_request(kind: type[Kind], source: bytes | Mapping[str, str]) -> Kind:
    """Parse a JSON body, or an address's parameters, as a request. Raises Refusal, which names the faulty field."""
    try:
        return kind.model_validate_json(source) if isinstance(source, bytes) else kind.model_validate_strings(dict(source))
    except ValidationError as invalid:
        faults = invalid.errors(include_url=False, include_input=False, include_context=False)
        # for a field of several types, the error of the type whose validation came furthest
        fault = max(faults, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
        message = fault["msg"].removeprefix("Value error, ")
        param = str(fault["loc"][0]) if fault["loc"] else None
        if param is not None:
            message = f"{param}: {message}"
        elif fault["type"] == "value_error":
            # the message begins with the field that is not supported yet
            param = message.partition("=")[0]
        raise Refusal(400, message, param=param, code=fault["type"]) from None


def refused(error: BaseException, number: str | None = None) -> Response:
    """Return the HTTP response for an error, a Refusal or what `refusal_of` makes of it, with the request's id, if given."""
    refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers | ({} if number is None else {"X-Request-Id": number}))


class EventStream(Response):
    """A response of server-sent events; `close` is called when the last one is sent, or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", **headers})
        # a stream has no length that is known before
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # OSError: the client has gone
            with suppress(ClientDisconnect, OSError, Stopping):
                await unless_gone(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Stopping(Refusal):
    """The refusal of a request that a stopping server has no time left to finish."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping; try again later", code="unavailable", headers={"Retry-After": "5"})


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`, or raise its error.

    Raises ClientDisconnect if the client leaves first, Stopping if the server cancels the request; both cancel `work`.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    except asyncio.CancelledError:
        raise Stopping from None
    finally:
        for task in (working, going):
            task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)
        # an error's traceback has this frame, which would keep the task and all that the request had loaded
        del working, going, task
