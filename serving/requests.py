"""OpenAI's two generating calls: the supported parts of their bodies, their answers, and the exchange with the scheduler.

An unsupported field is refused rather than ignored, so that an answer is always as the request specifies.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loraweave.serving.batch import Chosen, Piece, Row, Sampling
from loraweave.serving.http import Stopping
from loraweave.serving.limits import KeyHolder, refusal_of
from loraweave.serving.names import Served
from loraweave.serving.scheduler import Scheduler

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_ALTERNATIVES = 16, 256, 20

# fields that are accepted with these values only, which change nothing, and with None
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


def _whole(value: Any) -> Any:
    """Return a float without a fraction, such as 5.0, as an int, since JSON has one kind of number; else the value."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


# a token's text, its log-probability, and the likeliest tokens with theirs
Pick = tuple[str, float | None, list[tuple[str, float]]]


class Fields(BaseModel):
    """An object of a request: of known fields, each of its JSON type; a null field counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class StreamOptions(Fields):
    include_usage: bool = False
    # padding against those who watch the network, which nothing is gained from without
    include_obfuscation: Literal[False] = False


class Asked(Fields):
    """The fields that the bodies of /v1/completions and /v1/chat/completions share."""

    # the limit of new tokens for requests without one; infinity for the server's own limit
    usual_tokens: ClassVar[float] = math.inf
    # the prefix of an answer's id, and the `object` field of a whole answer and of a streamed part
    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # fields about the client, which change no answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    service_tier: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @model_validator(mode="after")
    def _without_what_is_not_there(self) -> Self:
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name, None)
            # True is 1 to Python, and not to JSON
            if value is not None and all(type(value) is not type(one) or value != one for one in neutral):
                raise ValueError(f"{name}={value!r:.60} is not supported: leave it out")
        return self

    def sampling(self, max_tokens: int, number: int, stops: tuple[str, ...] = ()) -> Sampling:
        """Return the sampling of answer `number` to a prompt, which draws with the request's seed plus `number`.

        `stops` end the answer besides the request's own stop strings.
        """
        stop = (*([self.stop] if isinstance(self.stop, str) else self.stop or ()), *stops)
        temperature = 1.0 if self.temperature is None else self.temperature
        # a generator takes no negative seed
        seed = None if self.seed is None else (self.seed + number) % 2**64
        return Sampling(max_tokens, temperature, self.top_p or 1.0, seed, stop, self.alternatives)

    @property
    def characters(self) -> list[int]:
        """The numbers of characters, or of token ids, that the prompts have before a chat template is applied."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """The number of likeliest tokens to return with each token's log-probability; None for no log-probabilities."""
        raise NotImplementedError

    def text(self, text: str, *, is_part: bool) -> dict[str, Any]:
        """Return the fields of a choice that hold an answer's text, or a streamed part of the text."""
        raise NotImplementedError

    def logprobs_of(self, picks: Sequence[Pick], offset: int) -> dict[str, Any]:
        """Return the `logprobs` field for tokens, the first of which begins at character `offset` of the answer."""
        raise NotImplementedError


class CompletionRequest(Asked):
    """The body of /v1/completions: a prompt or several, as text or as token ids."""

    # OpenAI's own default
    usual_tokens: ClassVar[float] = 16
    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def characters(self) -> list[int]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(map(len, self.prompt if several else [self.prompt]))  # type: ignore[arg-type]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def text(self, text: str, *, is_part: bool) -> dict[str, Any]:
        return {"text": text}

    def logprobs_of(self, picks: Sequence[Pick], offset: int) -> dict[str, Any]:
        offsets = [offset + sum(len(word) for word, *_ in picks[:number]) for number in range(len(picks))]
        # of several tokens with the same text, such as parts of characters, the likeliest counts
        top = [dict(reversed(others)) for _, _, others in picks]
        words, values = [word for word, *_ in picks], [value for _, value, _ in picks]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


class TextPart(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as a chat template reads it: its content is one text, and arguments of tools are objects."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        message = {**self.model_dump(exclude_none=True), "content": text}
        for call in message.get("tool_calls", ()):
            function = call.get("function")
            # text that is no JSON is shown as it is
            with suppress(TypeError, ValueError, RecursionError):
                call["function"] = {**function, "arguments": json.loads(function["arguments"])}
        return message


class ChatRequest(Asked):
    """The body of /v1/chat/completions: messages, which the tokenizer's chat template makes into a prompt."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None

    @model_validator(mode="after")
    def _under_one_name(self) -> Self:
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @property
    def characters(self) -> list[int]:
        return [len(str(self.tools or "")) + sum(len(message.for_template()["content"]) for message in self.messages)]

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def text(self, text: str, *, is_part: bool) -> dict[str, Any]:
        if is_part:
            return {"delta": {"content": text}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs_of(self, picks: Sequence[Pick], offset: int) -> dict[str, Any]:
        def entry(word: str, logprob: float | None) -> dict[str, Any]:
            return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

        told = [{**entry(word, value), "top_logprobs": [entry(*other) for other in others]} for word, value, others in picks]
        return {"content": told, "refusal": None}


@dataclass
class Choice:
    """One answer of a request, as far as it has been generated."""

    row: Row
    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish: str | None = None
    # the number of characters of the tokens reported so far
    offset: int = 0


class Answer:
    """The response to one request, which holds all its choices, in the form that the API call prescribes."""

    def __init__(self, asked: Asked, served: Served, tokenizer: Any, rows: Sequence[Row], num_prompt_tokens: int) -> None:
        self.served = served
        self.choices = list(map(Choice, rows))
        self._asked = asked
        self._num_prompt_tokens = num_prompt_tokens
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{asked.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": served.canonical,
        }

    async def hear(self, pieces: AsyncIterator[tuple[int, Piece]]) -> None:
        """Append all pieces to their choices. Raises the error that ended a row."""
        async for index, piece in pieces:
            choice = self.choices[index]
            choice.text += piece.text
            choice.chosen += piece.chosen
            choice.finish = piece.finish

    def body(self) -> dict[str, Any]:
        """Return the JSON body of a response that is not streamed, once all pieces are appended."""
        choices = []
        for index, choice in enumerate(self.choices):
            text = self._asked.text(choice.text, is_part=False)
            choices.append(self._choice(index, text, choice.chosen, choice.finish))
        return {**self._head, "object": self._asked.whole, "choices": choices, "usage": self.usage()}

    def beginnings(self) -> list[dict[str, Any]]:
        """Return the events that begin a stream: for a chat, one with the assistant's role for each choice, else none."""
        said = {"delta": {"role": "assistant", "content": ""}}
        numbers = range(len(self.choices)) if isinstance(self._asked, ChatRequest) else ()
        return [self._part([{"index": index, **said, "logprobs": None, "finish_reason": None}]) for index in numbers]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the stream's event for one piece of the choice `index`."""
        self.choices[index].finish = piece.finish
        return self._part([self._choice(index, self._asked.text(piece.text, is_part=True), piece.chosen, piece.finish)])

    def ending(self) -> list[dict[str, Any]]:
        """Return the events that end a stream: one with the numbers of tokens if the request wants them, else none."""
        options = self._asked.stream_options
        return [self._part([]) | {"usage": self.usage()}] if options is not None and options.include_usage else []

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._asked.part, "choices": choices}

    def _choice(self, index: int, text: dict[str, Any], chosen: Sequence[Chosen], finish: str | None) -> dict[str, Any]:
        told, choice = None, self.choices[index]
        if self._asked.alternatives is not None:
            picks = [
                (self._word(pick.token), pick.logprob, [(self._word(token), value) for token, value in pick.top])
                for pick in chosen
            ]
            told = self._asked.logprobs_of(picks, choice.offset)
            choice.offset += sum(len(word) for word, *_ in picks)
        return {"index": index, **text, "logprobs": told, "finish_reason": finish}

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens read, chosen so far, and taken from kept prompts, as in OpenAI's `usage`."""
        num_new = sum(len(choice.row.tokens) for choice in self.choices)
        num_prompt = self._num_prompt_tokens
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.choices[0].row.num_kept}}


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
