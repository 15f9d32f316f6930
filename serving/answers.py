"""The answers to OpenAI's two generating calls: their rows on the way, and their bodies, whole or as server-sent events.

    the scheduler's thread -- (index, Piece or error) --> asyncio.Queue --> whole() or events() of an Exchange

Leaving an exchange, in whatever way, tells the scheduler that rows which are not over need not go on.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from loraweave.serving.limits import refusal_of
from loraweave.serving.row import Chosen, Piece, Row, Sampling, Served
from loraweave.serving.scheduler import Scheduler

Event = tuple[int, Piece | BaseException]


@dataclass
class Choice:
    """One answer of a request, as far as it has come."""

    row: Row
    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish: str | None = None
    # characters of the tokens told so far
    offset: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.chosen += piece.chosen
        self.finish = piece.finish


class Answer:
    """The answer to one request; a subclass has the form of its call."""

    prefix: str
    whole: str
    part: str

    def __init__(self, model: str, served: Served, tokenizer: Any, rows: Sequence[Row], num_prompt_tokens: int) -> None:
        self.served = served
        self._num_prompt_tokens = num_prompt_tokens
        self.choices = [Choice(row) for row in rows]
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": served.canonical,
        }

    def body(self) -> dict[str, Any]:
        """Return the whole answer's body."""
        choices = [
            {"index": index, **self._message(choice.text), "logprobs": self._logprobs(choice, choice.chosen)}
            | {"finish_reason": choice.finish}
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": self.whole, "choices": choices, "usage": self._usage()}

    def beginnings(self) -> list[dict[str, Any]]:
        """Return the bodies that a stream begins with, before the first piece."""
        return []

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the body that a stream has for a piece of one answer."""
        logprobs = self._logprobs(self.choices[index], piece.chosen)
        return self._chunk(index, self._delta(piece.text), logprobs, piece.finish)

    def usage(self) -> dict[str, Any]:
        """Return the body that ends a stream where usage is asked for."""
        return {**self._head, "object": self.part, "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self.part, "choices": [choice]}

    def _usage(self) -> dict[str, Any]:
        num_new = sum(len(choice.row.tokens) for choice in self.choices)
        num_prompt = self._num_prompt_tokens
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.choices[0].row.num_kept}}

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _message(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        """Return the log-probabilities of these tokens, or None if none are asked for."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """An answer of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _message

    def _logprobs(self, choice: Choice, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if choice.row.sampling.logprobs is None:
            return None
        words, offsets = [self._word(pick.token) for pick in chosen], []
        for word in words:
            offsets.append(choice.offset)
            choice.offset += len(word)
        # of several tokens that are the same text, such as parts of characters, the likeliest counts
        top = [{self._word(token): logprob for token, logprob in reversed(pick.top)} for pick in chosen]
        values = [pick.logprob for pick in chosen]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def beginnings(self) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta, None, None) for index in range(len(self.choices))]

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _logprobs(self, choice: Choice, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if choice.row.sampling.logprobs is None:
            return None
        told = [
            {**self._entry(pick.token, pick.logprob), "top_logprobs": [self._entry(*other) for other in pick.top]}
            for pick in chosen
        ]
        return {"content": told, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}


class Exchange:
    """The rows of one request, added before `submit`. A context manager, or closed by the stream that it becomes."""

    def __init__(self, scheduler: Scheduler, ended: Callable[[], None]) -> None:
        self.rows: list[Row] = []
        self._scheduler = scheduler
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Event] = asyncio.Queue()
        self._open = True

    def add(self, prompts: Sequence[Sequence[int]], served: Served, sampling: Sampling, deadline: float) -> None:
        """Add a row, which tells this exchange of its pieces from any thread."""
        index = len(self.rows)

        def tell(event: Piece | BaseException) -> None:
            # a loop that is closed has no client left
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

        self.rows.append(Row(prompts, served, sampling, tell, deadline=deadline))

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
