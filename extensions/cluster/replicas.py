"""Replicas of the server on Ray Serve: a request goes to a replica that already holds its formula's factors.

a client -> Ray's proxy -> Front, which reads the formula -> by Ray's model multiplexing, a Replica -> its own `make_app`

A replica tells Ray the formulas that it had last. A request goes to a replica that had its formula; if these stay busy for a
second, or none did, to the one with the fewest (https://docs.ray.io/en/latest/serve/model-multiplexing.html).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from loraweave import CompositionError, FormulaError, Hub, PackageMissing, load_base, parse
from loraweave.extend.serving import Limits, Refusal, make_app, read_body, refused, too_busy

# the keys of an ASGI scope that the routes read and that can be sent to another process
SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
# the header with the name of the replica that answered
HEADER = b"x-loraweave-replica"


def replicated(
    hub: Hub,
    *,
    api_key: str,
    num_replicas: int = 2,
    base: Mapping[str, Any] = MappingProxyType({}),
    limits: Limits | None = None,
    ray_actor_options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Make an application for `ray.serve.run`: servers over one hub, each with the base model that `base` names.

    `base` are the arguments of `lw.load_base`, `limits` those of each replica, `ray_actor_options` what Ray gives it, like
    {"num_gpus": 1}. A replica with `limits.rows` requests is busy, and `limits.waiting` requests wait for one that is not;
    more are refused with 429. The hub travels as its address, and clients send `api_key` as their bearer token.
    Raises CompositionError for an empty key, since Ray's proxies may listen on every address, PackageMissing without Ray.
    """
    if not api_key:
        raise CompositionError("replicas may be reached from other machines: give the api_key that their clients send")
    try:
        from ray import serve
    except ImportError as error:
        raise PackageMissing(f"replicas run on Ray Serve ({error}): pip install 'loraweave[ray-serve]'") from error
    limits = limits or Limits()
    options = {"num_replicas": num_replicas, "ray_actor_options": dict(ray_actor_options)}
    queues = {"max_ongoing_requests": limits.rows, "max_queued_requests": limits.waiting}
    replicas = serve.deployment(Replica, **options, **queues).bind(hub, dict(base), limits, api_key)  # type: ignore[arg-type]
    # the front only waits for replicas, so it may hold many requests
    most = 2 * (limits.waiting + limits.rows * num_replicas)
    return serve.deployment(Front, max_ongoing_requests=most).bind(replicas, limits)


class Front:
    """The entry of all requests, which reads the formula of each and passes the request on."""

    def __init__(self, replicas: Any, limits: Limits) -> None:
        self._replicas, self._limits = replicas.options(stream=True), limits

    async def __call__(self, request: Request) -> Response:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError

        try:
            body = await read_body(request, self._limits) if request.method == "POST" else b""
            scope = {key: request.scope[key] for key in SCOPE if key in request.scope}
            messages = self._replicas.options(multiplexed_model_id=formula_of(body)).answer.remote(scope, body)
            async with asyncio.timeout(self._limits.seconds):
                start = await anext(messages)
        except BackPressureError:
            return refused(too_busy("all replicas are, and many requests wait"))
        except TimeoutError:
            return refused(Refusal(504, "the deadline passed before a replica answered", code="deadline_exceeded"))
        except (Refusal, RayError) as error:
            # a replica that died sends no answer
            return refused(error)
        response = StreamingResponse((message["body"] async for message in messages), start["status"])
        response.raw_headers = start["headers"]
        return response


def formula_of(body: bytes) -> str:
    """Return the canonical formula in a request's body; "" (any replica will do) for none and for `auto`."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, FormulaError):
        formula = parse(json.loads(body)["model"])
        return "" if formula.is_auto else formula.canonical
    return ""


class Replica:
    """A server with the base model in its process."""

    def __init__(self, hub: Hub, base: Mapping[str, Any], limits: Limits, api_key: str) -> None:
        from ray import serve

        @serve.multiplexed(max_num_models_per_replica=limits.loaded)  # type: ignore[untyped-decorator]
        async def note(formula: str) -> str:
            return formula

        model, tokenizer = load_base(**base)
        self._app = make_app(hub, model, tokenizer, limits=limits, api_key=api_key)
        self._app.state.face.scheduler.start()
        # a call of this tells Ray which formula the replica holds
        self._note = note
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Yield the ASGI messages of the answer to one request. Closing the iterator cancels the request."""
        from ray import serve

        if formula := serve.get_multiplexed_model_id():
            await self._note(formula)
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        sent: asyncio.Queue[Any] = asyncio.Queue()

        async def receive() -> Any:
            # after its body a client sends nothing; Ray cancels this call when the client has gone
            return incoming.pop() if incoming else await asyncio.Event().wait()

        answering = asyncio.create_task(self._app(scope, receive, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (HEADER, self._name.encode())]
                yield message
            await answering
        finally:
            answering.cancel()

    def check_health(self) -> None:
        """Raise RuntimeError if the scheduler has stopped, for Ray to start another replica."""
        if not self._app.state.face.scheduler.alive:
            raise RuntimeError("the scheduler has stopped")

    def __del__(self) -> None:
        self._app.state.face.close()
