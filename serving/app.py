"""The server's HTTP application: routes, keys, errors in OpenAI's form, and the course of a request.

a request -> read, at most body_bytes -> its prompts and its composition, in threads -> rows -> the scheduler
                                                                                         |
                                                           JSON or events <- Exchange <--'

Two threads read prompts and model names. Opening adapters, merging and searching have threads of their own, so that a
request whose composition is loaded waits for none of them. Requests for one composition wait for one thread that makes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import loraweave.registry as registry
from loraweave.common.chat import Prompt
from loraweave.common.process import give_back_freed_memory
from loraweave.composer.model.scoring import answer_in
from loraweave.errors import CompositionError, HubError
from loraweave.hub.hub import Hub
from loraweave.hub.stores.open_stores import hub_exists
from loraweave.serving.batch import Sampling
from loraweave.serving.http import (
    Bodies,
    EventStream,
    Stopping,
    loopback_only,
    read_body,
    read_request,
    refused,
    request_id,
    require_loopback,
    unless_gone,
)
from loraweave.serving.limits import KeyHolder, Keys, Limits, Refusal, Turns, logger, read_keys
from loraweave.serving.names import Names, Served, Wanted
from loraweave.serving.prompts import Given, Prompts
from loraweave.serving.requests import Answer, Asked, ChatRequest, CompletionRequest, Exchange
from loraweave.serving.scheduler import Metrics, Scheduler, too_busy

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

# threads that read prompts and names, and that open adapters; more only take turns on the interpreter's lock
NUM_READERS, NUM_OPENERS = 2, 2
# seconds within which a hub answers a server that is ready
HUB_SECONDS = 2.0
# the characters of all prompts of a request that is short, which is read within milliseconds
SHORT = 1 << 14
# the status counted for a request whose client disconnected before its answer
CLIENT_GONE = 499
# calls of OpenAI's API that are answered by 404, and what to use instead
NOT_SERVED = {
    "/v1/responses": "use /v1/chat/completions",
    "/v1/embeddings": "the models of this server write text, and give no embeddings",
}
# characters that a header's value may have unescaped
PLAIN = "".join(map(chr, range(32, 127))).replace("%", "")


def make_app(
    hub: Hub,
    model: Any,
    tokenizer: Any,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    key_file: str | Path | None = None,
) -> Starlette:
    """Make an ASGI application over a model and a hub; its scheduler runs between the application's start-up and shut-down.

    Raises CompositionError for a model whose rows cannot share a cache, an empty key, and a file that has no valid keys.
    """
    keys = Keys(api_key, {} if key_file is None else read_keys(key_file))
    face = Face(hub, model, tokenizer, limits or Limits(), keys)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        face.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(face.close)

    handlers: list[tuple[str, str, Handler]] = [
        ("/health", "GET", face.health),
        ("/ready", "GET", face.ready),
        ("/metrics", "GET", face.figures),
        ("/v1/models", "GET", face.models),
        ("/v1/models/{name:path}", "GET", face.model),
        ("/v1/completions", "POST", partial(face.answer, CompletionRequest)),
        ("/v1/chat/completions", "POST", partial(face.answer, ChatRequest)),
    ]
    routes = [Route(path, face.guarded(path, handler), methods=[method]) for path, method, handler in handlers]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.state.face = face
    return app


def make_server(
    hub: Hub,
    model: Any,
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    api_key: str | None = None,
    key_file: str | Path | None = None,
    log_level: str = "info",
    log_format: str | None = None,
) -> Any:
    """Make a uvicorn server; its `run()` serves requests until interrupted, or until its `should_exit` is set.

    Without `api_key` and `key_file` (`read_keys`), the server accepts requests to loopback host names only. `log_format` is
    "text" or "json", by an extension, with a record for each request; by default uvicorn logs as it is configured to.
    Raises CompositionError if other machines reach `host` and there is no key, for an empty key or a faulty file of keys,
    and for a model that cannot be served.
    """
    from loraweave.serving.server import Server, Settings

    is_open = api_key is None and key_file is None
    if is_open:
        require_loopback(
            host,
            "without a key anyone there may use this server: give --api-key (or LORAWEAVE_API_KEY), or keep --host "
            "127.0.0.1",
        )
    app = make_app(hub, model, tokenizer, limits=limits, api_key=api_key, key_file=key_file)
    answering = loopback_only(app) if is_open else app
    settings: dict[str, Any] = {"host": host, "port": port, "log_level": log_level}
    if (parts := app.state.face.parts) is not None:
        answering = parts.observed(answering)
        if log_format is not None:
            settings |= {"log_config": parts.log_config(log_format, log_level), "access_log": False}
    elif log_format == "json":
        raise CompositionError("log_format 'json' needs an extension that writes logs, and none is installed")
    return Server(Settings(answering, limits or Limits(), **settings), app.state.face)


@dataclass(eq=False)
class Making:
    """A composition that a thread is making: the thread's future, the event loop's, and the number of requests that wait."""

    running: Future[Served] = field(init=False)
    done: asyncio.Future[Served] = field(init=False)
    num_waiting: int = 0


class Face:
    """The handlers of the HTTP routes, with the scheduler, names and prompts that they share."""

    def __init__(self, hub: Hub, model: Any, tokenizer: Any, limits: Limits, keys: Keys) -> None:
        self._limits = limits
        self._keys = keys
        self._tokenizer = tokenizer
        self.parts = parts = next(registry.bringing("server"), None)
        self._metrics: Metrics = Metrics() if parts is None else parts.make_metrics()
        self._names = Names(hub, model, tokenizer, limits)
        self._prompts = Prompts(model, tokenizer, limits.prompt_characters)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="loraweave-reader")
        # of long prompts, so that short ones share nothing with them
        self._long_prompts, self._turns = Prompts(model, tokenizer), Turns()
        self._long_reader = ThreadPoolExecutor(1, thread_name_prefix="loraweave-long-reader")
        self._openers = ThreadPoolExecutor(NUM_OPENERS, thread_name_prefix="loraweave-opener")
        self._mergers = ThreadPoolExecutor(1, thread_name_prefix="loraweave-merger")
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="loraweave-searcher")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="loraweave-checker")
        self._checking: asyncio.Future[int] | None = None
        self.is_stopping = False
        self._hub = hub
        self._bodies = Bodies(limits.reading_bytes)
        self._making: dict[str, Making] = {}
        self._open: set[Exchange] = set()
        self._metrics.watch(open_requests=lambda: len(self._open))
        more = () if parts is None else (parts.make_admission, parts.make_prefixes(limits.prefix_bytes))
        self.scheduler = Scheduler(model, tokenizer, limits, self._metrics, *more)

    def close(self) -> None:
        self.scheduler.close()
        for threads in (self._readers, self._long_reader, self._openers, self._mergers, self._searcher, self._checker):
            # a merge that is being made is not waited for
            threads.shutdown(wait=False, cancel_futures=True)

    def guarded(self, path: str, handler: Handler) -> Handler:
        """Return the handler wrapped to check the server's key, answer errors as JSON, and count requests by path."""

        async def answer(request: Request) -> Response:
            begun, response = time.monotonic(), Response(status_code=500)
            number = request_id(request.headers.get("x-request-id", ""))
            try:
                if path not in ("/health", "/ready"):
                    request.state.holder = self._keys.holder(request.headers.get("authorization", ""))
                    request.state.holder.requests.take("requests")
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            except Exception as error:
                response = refused(error)
            finally:
                self._metrics.request(path, response.status_code, time.monotonic() - begun)
            response.headers["X-Request-Id"] = number
            return response

        return answer

    async def health(self, request: Request) -> Response:
        alive = self.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        """Answer 200 if the server takes requests and its hub answers in time; probes that come meanwhile share one look."""
        status = "stopping"
        if not self.is_stopping and self.scheduler.alive:
            if self._checking is None or self._checking.done():
                self._checking = asyncio.get_running_loop().run_in_executor(self._checker, self._look_at_hub)
            try:
                async with asyncio.timeout(HUB_SECONDS):
                    await asyncio.shield(self._checking)
                return JSONResponse({"status": "ready"})
            except Exception as error:
                logger.warning("not ready: the hub does not answer", exc_info=error)
                status = "the hub does not answer"
        return JSONResponse({"status": status}, 503)

    def _look_at_hub(self) -> int:
        # an open database answers without its folder, too
        if not hub_exists(self._hub._address[0]):
            raise HubError(f"there is no hub in {self._hub.path} any more")
        return self._hub.generation

    @property
    def num_open(self) -> int:
        """The number of requests that are being answered."""
        return len(self._open)

    def end_answers(self) -> None:
        """End all answers that are not complete: streams by an error and [DONE], others by 503."""
        for exchange in self._open:
            exchange.stop()

    async def figures(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": self._metrics.content_type})

    async def models(self, request: Request) -> Response:
        listed = await self._in(self._readers, time.monotonic() + self._limits.seconds, self._names.listed)
        return JSONResponse({"object": "list", "data": [_model(name, created) for name, created in listed]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name.strip() == "auto":
            return JSONResponse(_model("auto", 0))
        wanted = await self._wanted(name, "", time.monotonic() + self._limits.seconds)
        return JSONResponse(_model(name, 0), headers=_headers(wanted.formula.canonical, wanted.identity))

    async def answer(self, form: type[Asked], request: Request) -> Response:
        # for an extension that tells what became of the request
        record = request.scope.get("record", {})
        body = read_request(form, await read_body(request, self._limits, self._bodies))
        record["model"] = body.model
        if self.is_stopping:
            raise Stopping
        if len(self._open) >= self._limits.waiting + self._limits.rows:
            raise too_busy(f"{len(self._open)} requests are open")
        self._prompts.require_short(body)
        deadline = time.monotonic() + self._limits.seconds
        exchange = Exchange(self.scheduler, self._open, request.state.holder)
        client = f"{exchange.holder.name} {request.client.host if request.client else ''}"
        try:
            exchange.num_counted = exchange.holder.take_rows(1)
            answer = await unless_gone(request.receive, self._begin(exchange, client, body, deadline))
            record["answer"] = answer
            headers = _headers(answer.served.canonical, answer.served.identity)
            pieces = exchange.pieces()
            if body.stream:
                # what fails before the first token is an answer with a status of its own
                first = await unless_gone(request.receive, anext(pieces))
                return EventStream(exchange.events(answer, first, pieces), exchange.close, headers)
            await unless_gone(request.receive, answer.hear(pieces))
        except BaseException:
            exchange.close()
            raise
        exchange.close()
        return JSONResponse(answer.body(), headers=headers)

    async def _begin(self, exchange: Exchange, client: str, asked: Asked, deadline: float) -> Answer:
        """Read the prompts, load the composition, and submit the rows; return the answer, which has no text yet."""
        holder = exchange.holder
        if (num_characters := sum(asked.characters)) <= SHORT:
            inputs = await self._in(self._readers, deadline, self._prompts.read, asked)
        else:
            # only one at a time is in the queue of the thread, and of any client that which costs least so far
            async with self._turns.turn(client, num_characters):
                inputs = await self._in(self._long_reader, deadline, self._long_prompts.read, asked)
        if (count := len(inputs.ids) * (num_answers := asked.n or 1)) > self._limits.choices:
            raise Refusal(400, f"{count} answers are asked for, above the limit of {self._limits.choices}", param="n")
        exchange.num_counted = holder.take_rows(count, exchange.num_counted)
        wanted = await self._wanted(asked.model, inputs.text, deadline)
        num_tokens = max(map(len, inputs.ids)) + min(asked.max_tokens or self._limits.new_tokens, self._limits.new_tokens)
        served = await self._served(wanted, num_tokens, deadline, holder)
        try:
            prompts = await self._asked(inputs, served, deadline, holder)
            num_new = self._prompts.num_new(prompts, asked.max_tokens, asked.usual_tokens, self._limits.new_tokens)
            for of_members in prompts:
                for number in range(num_answers):
                    exchange.add(of_members, served, asked.sampling(num_new, number, served.stops), deadline)
            self.scheduler.submit(exchange.rows)
        finally:
            # by now its rows hold it
            self.scheduler.release(served)
        num_read = sum(map(len, chain(*prompts)))
        return Answer(asked, served, self._tokenizer, exchange.rows, num_read)

    async def _asked(self, given: Given, served: Served, deadline: float, holder: KeyHolder) -> list[list[tuple[int, ...]]]:
        """Run the compositions `before` each member; return the members' prompts as token ids, by [prompt][member]."""
        between: dict[tuple[Served, ...], Sequence[Prompt]] = {}
        for _ in chain(*dict.fromkeys(member.before for member in served.members)):
            # their rows run in the place of the request's own, which the key has already
            holder.requests.take("requests, steps of programs among them,")
        for member in served.members:
            if member.before and member.before not in between:
                said = given
                for step in member.before:
                    said = replace(said, inputs=await self._said(said, step, deadline, holder))
                between[member.before] = said.inputs or ()
        is_long = sum(map(len, given.ids)) > SHORT and any(member.task is not None for member in served.members)
        prompts, threads = (self._long_prompts, self._long_reader) if is_long else (self._prompts, self._readers)
        return await self._in(threads, deadline, prompts.of_members, given, served, between)

    async def _said(self, given: Given, step: Served, deadline: float, holder: KeyHolder) -> list[Prompt]:
        """Return the answers of `step`, a composition that runs before others, to each prompt: the next step's inputs."""
        prompts = await self._asked(given, step, deadline, holder)
        num_new = self._prompts.num_new(prompts, step.max_new_tokens, 0, self._limits.new_tokens)
        with closing(Exchange(self.scheduler, set(), holder)) as exchange:
            for of_members in prompts:
                exchange.add(of_members, step, Sampling(num_new, temperature=0.0, stop=step.stops), deadline)
            self.scheduler.submit(exchange.rows)
            texts = [""] * len(prompts)
            async for index, piece in exchange.pieces():
                texts[index] += piece.text
        return [answer_in(text, step.stops) for text in texts]

    async def _wanted(self, name: str, prompt: str, deadline: float) -> Wanted:
        """Return the formula that a model name stands for in the hub now; for `auto`, the formula found for the prompt."""
        wanted = await self._in(self._readers, deadline, self._names.wanted, name)
        if wanted.formula.is_auto:
            chosen = await self._in(self._searcher, deadline, self._names.found_for, prompt)
            wanted = await self._in(self._readers, deadline, self._names.wanted, chosen)
        return wanted

    async def _served(self, wanted: Wanted, num_tokens: int, deadline: float, holder: KeyHolder) -> Served:
        """Return the composition, loaded until `release`; it is not made if all who wait leave before a thread begins."""
        if wanted.formula.is_base:
            return Served()
        if (served := self.scheduler.experts.hold(wanted.identity)) is None:
            if (making := self._making.get(wanted.identity)) is None:
                holder.formulas.take("formulas that are not loaded")
                threads = self._mergers if wanted.merges else self._openers
                # there before the thread begins, which ends where it is not
                making = self._making[wanted.identity] = Making()
                making.running = threads.submit(self._make, wanted, num_tokens, deadline)
                making.done = asyncio.wrap_future(making.running)
            making.num_waiting += 1
            try:
                served = await self._within(deadline, asyncio.shield(making.done))
                self.scheduler.experts.pin(served)
            finally:
                making.num_waiting -= 1
                if not making.num_waiting:
                    making.running.cancel()
                    making.running.add_done_callback(self._drop_made)
                    if self._making.get(wanted.identity) is making:
                        del self._making[wanted.identity]
                    self.scheduler.wake()
        return replace(served, canonical=wanted.formula.canonical)

    def _make(self, wanted: Wanted, num_tokens: int, deadline: float) -> Served:
        """Make a composition, once there is memory for it, and load it until it is released."""
        wanted, identity = self._names.opened(wanted), wanted.identity
        adapters = () if wanted.pool is None else wanted.pool.adapters.values()
        with self.scheduler.room(adapters, wanted.num_values, num_tokens, deadline, lambda: identity in self._making):
            if wanted.num_values:
                # of the compositions that made room
                give_back_freed_memory()
            served = self._names.make(wanted)
            self.scheduler.prepare(served)
        return served

    def _drop_made(self, made: Future[Served]) -> None:
        if not made.cancelled() and made.exception() is None:
            self.scheduler.release(made.result())

    async def _in(self, threads: ThreadPoolExecutor, deadline: float, work: Callable[..., T], *of: Any) -> T:
        return await self._within(deadline, asyncio.get_running_loop().run_in_executor(threads, work, *of))

    @staticmethod
    async def _within(deadline: float, running: asyncio.Future[T]) -> T:
        """Return the result of `running`. Raises Refusal at the deadline; work that a thread has begun continues."""
        try:
            # wait_for of Python 3.11 loses a cancellation that arrives just as the awaited future ends
            async with asyncio.timeout(deadline - time.monotonic()):
                return await running
        except TimeoutError as error:
            raise Refusal(504, "the deadline passed before the composition was loaded", code="deadline_exceeded") from error


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "loraweave"}


def _headers(canonical: str, identity: str) -> dict[str, str]:
    """Return headers that name the answering composition: its formula, percent-encoded where needed, and its identity."""
    return {"X-Loraweave-Formula": quote(canonical, safe=PLAIN), "X-Loraweave-Identity": identity}


async def _no_route(request: Request, error: Any) -> Response:
    detail = error.detail
    for path, instead in NOT_SERVED.items():
        if request.url.path == path or request.url.path.startswith(f"{path}/"):
            detail = f"{path} is not served here: {instead}"
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {detail}", headers=error.headers)
    return refused(refusal, request_id(request.headers.get("x-request-id", "")))
