"""A progress bar for work that takes longer than a person waits without wondering."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_S = 1.0

Item = TypeVar("Item")


def progress_bar(shown: bool, *, field: str = "") -> Progress:
    """A bar with the task's description, count and time left, and with a text that the task has in `field`, if any."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    texts = [TextColumn(f"{{task.fields[{field}]}}")] if field else []
    return Progress(*columns, *texts, disable=not shown)


def tracked(items: Iterable[Item], label: str, *, total: int, shown: bool = True) -> Iterator[Item]:
    """The items one by one; a bar on stderr from the first second on, if that is a terminal and `shown` is true."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not (shown and sys.stderr.isatty()))
    task = bar.add_task(label, total=total)
    started, running = time.monotonic(), False
    try:
        for item in items:
            if not running and time.monotonic() - started > PATIENCE_S:
                bar.start()
                running = True
            yield item
            bar.advance(task)
    finally:
        if running:
            bar.stop()
