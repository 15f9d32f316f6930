"""The uvicorn server of an application: connections and request heads within limits, and a stop that lets answers end."""

import asyncio
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from h11 import IDLE, SERVER, Data, EndOfMessage, Request, Response
from h11 import Connection as Parser
from h11 import RemoteProtocolError as Malformed
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraweave.serving.http import refused, request_id
from loraweave.serving.limits import Limits, Refusal

# seconds for the last bytes of answers, once there is no more time for answers
LAST_SECONDS = 2


class Settings(uvicorn.Config):
    """The settings of uvicorn with a server's limits, and the connections that wait for a request, the oldest first."""

    def __init__(self, app: ASGIApp, limits: Limits, **settings: Any) -> None:
        # httptools has no limit for a request's head
        settings |= {"http": Connection, "h11_max_incomplete_event_size": limits.head_bytes, "ws": "none"}
        super().__init__(app, timeout_graceful_shutdown=LAST_SECONDS, **settings)
        self.limits = limits
        self.silent: dict[Connection, asyncio.TimerHandle] = {}


class Heads(Parser):
    """A parser that refuses a request's head above `most` bytes; h11 itself refuses only one that is not complete."""

    def __init__(self, most: int) -> None:
        super().__init__(SERVER, most)
        self._most = most

    def next_event(self) -> Any:
        num_bytes = len(self.trailing_data[0]) if self.their_state is IDLE else 0
        event = super().next_event()
        if isinstance(event, Request) and num_bytes - len(self.trailing_data[0]) > self._most:
            raise Malformed(f"the head has more than {self._most} bytes", 431)
        return event


class Connection(H11Protocol):
    """A connection that ends if a request's head comes late, or if it waits longest for one and there are too many."""

    config: Settings

    def __init__(self, config: Settings, *rest: Any, **options: Any) -> None:
        super().__init__(config, *rest, **options)
        self.conn = Heads(config.limits.head_bytes)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.config.limits.connections:
            next(iter(self.config.silent)).transport.abort()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._end_wait()

    def on_response_complete(self) -> None:
        before = self.cycle
        self._wait_for_head()
        super().on_response_complete()
        if self.cycle is not before:
            # the next request was there already
            self._end_wait()

    def send_400_response(self, msg: str) -> None:
        # uvicorn's own is plain text
        refusal = refused(Refusal(400, msg, headers={"Connection": "close"}), request_id())
        for event in (
            Response(status_code=400, headers=refusal.raw_headers),
            Data(data=bytes(refusal.body)),
            EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._end_wait()
        if not self.transport.is_closing():
            self.config.silent[self] = self.loop.call_later(self.config.limits.head_seconds, self.transport.abort)

    def _end_wait(self) -> None:
        if (timer := self.config.silent.pop(self, None)) is not None:
            timer.cancel()


class Server(uvicorn.Server):
    """A server that, told to stop, refuses new requests for `grace` seconds while begun answers end, and exits with 0."""

    def __init__(self, config: Settings, face: Any) -> None:
        super().__init__(config)
        self.face = face
        self._grace = config.limits.grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal again at the end
        self.face.is_stopping = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.face.is_stopping = True
        end = time.monotonic() + self._grace
        while self.face.num_open and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        self.face.end_answers()
        await super().shutdown(sockets)
