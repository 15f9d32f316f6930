"""A server that listens on an address."""

from __future__ import annotations

from typing import Any

import uvicorn
from starlette.types import ASGIApp

from loraweave.hub.hub import Hub
from loraweave.serving.app import make_app
from loraweave.serving.http import loopback_only, require_loopback
from loraweave.serving.limits import Limits


def make_server(
    hub: Hub,
    model: Any,
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    api_key: str | None = None,
    log_level: str = "info",
) -> uvicorn.Server:
    """Make a server on an address; its `run()` answers until an interruption, or until `should_exit` is set.

    Without a key it answers under a loopback name alone.
    Raises CompositionError for an address that other machines reach without a key, and for a model that cannot be served.
    """
    if api_key is None:
        require_loopback(
            host,
            "without a key anyone there may use this server: give --api-key (or LORAWEAVE_API_KEY), or keep --host "
            "127.0.0.1",
        )
    app: ASGIApp = make_app(hub, model, tokenizer, limits=limits, api_key=api_key)
    if api_key is None:
        app = loopback_only(app)
    # a client may keep its stream open for as long as its request may take; stopping waits a few seconds for them
    return uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, log_level=log_level, ws="none", timeout_graceful_shutdown=5)
    )
