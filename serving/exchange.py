"""One request on its way: its rows, the pieces heard of them, and the answer, whole or as server-sent events.

    the scheduler's thread -- (index, Piece or error) --> asyncio.Queue --> whole() or events()

Leaving an exchange, in whatever way, tells the scheduler that rows which are not over need not go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraweave.serving.answers import Answer
from loraweave.serving.refusals import Refusal, refusal_of
from loraweave.serving.row import Piece, Row
from loraweave.serving.scheduler import Scheduler

T = TypeVar("T")
Event = tuple[int, Piece | BaseException]


class Exchange:
    """The rows of one request, added before `submit`. A context manager, or closed by the stream that it becomes."""

    def __init__(self, scheduler: Scheduler, ended: Callable[[], None]) -> None:
        self.rows: list[Row] = []
        self._scheduler = scheduler
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Event] = asyncio.Queue()
        self._open = True

    def teller(self) -> Callable[[Piece | BaseException], None]:
        """Return the function by which the next row tells this exchange of its pieces, from any thread."""
        index = len(self.rows)

        def tell(event: Piece | BaseException) -> None:
            # a loop that is closed has no client left
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

        return tell

    def submit(self) -> None:
        """Let the rows wait for their turn. Raises what the scheduler raises."""
        self._scheduler.submit(self.rows)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (number of the row, piece) until all rows are over. Raises what ended a row."""
        left = len(self.rows)
        while left:
            index, event = await self._heard.get()
            if isinstance(event, BaseException):
                raise event
            left -= event.finish is not None
            yield index, event

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the answer's body when all rows are over."""
        async for index, piece in self.pieces():
            answer.choices[index].add(piece)
        return answer.body()

    async def events(
        self, answer: Answer, first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]], usage: bool
    ) -> AsyncIterator[str]:
        """Yield the data of each server-sent event; an error is the last one, in place of [DONE]."""
        for body in answer.beginnings():
            yield json.dumps(body)
        try:
            yield json.dumps(answer.piece(*first))
            async for index, piece in rest:
                if piece.text or piece.chosen or piece.finish:
                    yield json.dumps(answer.piece(index, piece))
        except Exception as error:
            yield json.dumps(refusal_of(error).body)
            return
        if usage:
            yield json.dumps(answer.usage())
        yield "[DONE]"

    def close(self) -> None:
        """End the rows that are not over. May be called twice."""
        if self._open:
            self._open = False
            for row in self.rows:
                row.gone = not row.over
            self._scheduler.wake()
            self._ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
    """The refusal of a server that was told to stop, and whose time for what it had begun is over."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping; ask again when it runs")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Return or raise what `work` does, unless the client goes first.

    It is cancelled with ClientDisconnect when the client goes first, and with Stopping when the server gives it up.
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
