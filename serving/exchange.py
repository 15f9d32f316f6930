"""The exchange between a request in the event loop and its rows in the scheduler's thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from loraweave.serving.batch import Piece, Row, Sampling
from loraweave.serving.http import Stopping
from loraweave.serving.keys import KeyHolder
from loraweave.serving.limits import refusal_of
from loraweave.serving.names import Served
from loraweave.serving.requests import Answer
from loraweave.serving.scheduler import Scheduler


class Exchange:
    """The rows of one request, and a queue of their pieces, which the scheduler's thread fills.

    The exchange is in the set `is_open` until `close`, called after the response or its stream, tells the scheduler to end
    unfinished rows.
    """

    def __init__(self, scheduler: Scheduler, is_open: set[Exchange], holder: KeyHolder) -> None:
        self.rows: list[Row] = []
        self.holder = holder
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
        self._is_open = is_open
        # answers counted among those of the key
        self.num_counted = 0
        is_open.add(self)

    def add(self, prompts: Sequence[Sequence[int]], served: Served, sampling: Sampling, deadline: float) -> None:
        """Add a row for these prompts, whose pieces any thread may put into this exchange's queue."""
        index = len(self.rows)

        def tell(event: Piece | BaseException) -> None:
            # a loop that is closed has no client left
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

        self.rows.append(Row(prompts, served, sampling, tell, deadline=deadline))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index of the row, piece) until all rows have ended. Raises the error that ended a row."""
        left = len(self.rows)
        while left:
            index, event = await self._heard.get()
            if isinstance(event, BaseException):
                raise event
            left -= event.finish is not None
            yield index, event

    async def events(
        self, answer: Answer, first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]
    ) -> AsyncIterator[str]:
        """Yield the JSON text of each server-sent event, or of an error, then [DONE]."""
        for body in answer.beginnings():
            yield json.dumps(body)
        try:
            yield json.dumps(answer.piece(*first))
            async for index, piece in rest:
                if piece.text or piece.chosen or piece.finish:
                    yield json.dumps(answer.piece(index, piece))
        except Exception as error:
            yield json.dumps(refusal_of(error).body)
            yield "[DONE]"
            return
        for body in answer.ending():
            yield json.dumps(body)
        yield "[DONE]"

    def stop(self) -> None:
        """End the answers that are not complete by the refusal of a server that stops."""
        self._heard.put_nowait((0, Stopping()))

    def close(self) -> None:
        """Tell the scheduler to end the unfinished rows; a second call does nothing."""
        if self in self._is_open:
            self._is_open.remove(self)
            self.holder.num_rows -= self.num_counted
            for row in self.rows:
                row.gone = not row.over
            # rows tell this exchange, so that the two would wait for the garbage collector, with all adapters
            self.rows = []
            self._scheduler.wake()
