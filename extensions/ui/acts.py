"""Long acts: work in the model's thread that tells as it goes on, and ends where nobody listens any longer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from rich.progress import Progress, TaskID

from loraweave.extend import EventStream, Refusal

Tell = Callable[[dict[str, Any]], None]


class Left(BaseException):
    """The end of work that nobody listens to any longer. No `except Exception` on the way takes it for a failure."""


def act(thread: Executor, work: Callable[[Tell], None], refused: Callable[[BaseException], Refusal]) -> EventStream:
    """Return a stream of what `work(tell)` tells; if the client goes first, the next `tell` raises Left in the work.

    What the work raises is told last, as `refused` puts it. Acts of one thread run one after another; one whose client has
    gone before its turn does nothing.
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
            put(refused(error).body)
        finally:
            put(None)

    async def events() -> AsyncIterator[str]:
        while (event := await heard.get()) is not None:
            yield json.dumps(event)

    thread.submit(run)
    return EventStream(events(), left.set, {})


class ToldProgress(Progress):
    """A bar that is not drawn but told: what is done, how much, of how much, and the seconds left."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(disable=True)
        self._tell = tell

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        (task,) = (candidate for candidate in self.tasks if candidate.id == task_id)
        left = task.time_remaining
        self._tell({"what": task.description, "done": task.completed, "total": task.total, "seconds_left": left})
