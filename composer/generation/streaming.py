"""Text as it is generated: `generate` runs in a thread of its own, and its tokens come back as pieces of text."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

# what a decoder writes for bytes of a character that is not complete
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def streamed(generate: Callable[[Any], None], tokenizer: Any) -> Iterator[list[str]]:
    """One piece of text per sequence, as often as there is any; the pieces of a sequence make up its whole text.

    `generate(streamer)` runs in a thread of its own, from the first piece that is asked for on. What it raises is raised
    here. Whoever stops reading, stops it at its next token: the iterator's `close()`, or its end of life, waits for that.
    """
    # autocast is a thread's own
    devices = ("cpu", "cuda", "mps", "xpu")
    autocasts = [(device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device)]

    def generate_alike(streamer: Any) -> None:
        with ExitStack() as stack:
            for device, dtype in autocasts:
                stack.enter_context(torch.autocast(device, dtype))
            generate(streamer)

    return _pieces(generate_alike, tokenizer)


def _pieces(generate: Callable[[Any], None], tokenizer: Any) -> Iterator[list[str]]:
    pieces: queue.SimpleQueue[list[str] | BaseException | None] = queue.SimpleQueue()
    streamer = _Streamer(tokenizer, pieces.put)

    def work() -> None:
        try:
            generate(streamer)
        except _Stopped:
            pass
        except BaseException as error:
            pieces.put(error)
        else:
            pieces.put(None)

    thread = threading.Thread(target=work, name="loraweave-stream", daemon=True)
    thread.start()
    try:
        while (found := pieces.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        streamer.stopped = True
        # the garbage collector may end an abandoned iterator in whatever thread it runs
        if thread is not threading.current_thread():
            thread.join()


class _Stopped(Exception):
    """Nobody reads the stream any more."""


class _Streamer:
    """A streamer as transformers knows them, for a batch of any size."""

    def __init__(self, tokenizer: Any, send: Callable[[list[str]], None]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._send = send
        self._rows: list[_Row] | None = None

    def put(self, tokens: Tensor) -> None:
        """The next token of every sequence, or several of the only one; the first call has the prompts."""
        if self.stopped:
            raise _Stopped
        if self._rows is None:
            self._rows = [_Row(self._tokenizer) for _ in range(tokens.shape[0])]
            return
        new = tokens.reshape(len(self._rows), -1).tolist()
        self._pass_on([row.text(ids) for row, ids in zip(self._rows, new, strict=True)])

    def end(self) -> None:
        self._pass_on([row.rest() for row in self._rows or ()])

    def _pass_on(self, pieces: list[str]) -> None:
        if any(pieces):
            self._send(pieces)


class _Row:
    """The text of one sequence, decoded token by token.

    What a token adds can depend on those before it (a space, the bytes of one character), so it is what the text of the
    last few tokens has more with it than without it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._before: list[int] = []
        self._new: list[int] = []

    def text(self, ids: list[int]) -> str:
        """What these tokens add; "" while a character is incomplete."""
        self._new += [token for token in ids if token not in self._special]
        return self._difference(complete=True) if self._new else ""

    def rest(self) -> str:
        """What is left at the end."""
        return self._difference(complete=False) if self._new else ""

    def _difference(self, *, complete: bool) -> str:
        old, both = self._decoded(self._before), self._decoded(self._before + self._new)
        if complete and (both.endswith(INCOMPLETE) or not both.startswith(old) or len(both) == len(old)):
            return ""
        self._before, self._new = self._new, []
        return both[len(old) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.batch_decode(torch.tensor([ids], dtype=torch.long), skip_special_tokens=True)[0])
