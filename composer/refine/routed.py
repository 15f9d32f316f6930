"""What cannot be done with a composition whose weights a router makes, and what stands for it."""

from __future__ import annotations

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.members import Members
from loraweave.routers.routing.token_router import TokenRouter
from loraweave.types import Router


def require_no_router(router: Router | None, verb: str) -> None:
    """Raises ScopeError where there is a router: its weights depend on the input, and `verb` needs some that do not."""
    if router is not None:
        raise ScopeError(
            f"a composition by router {router_name(router)!r} cannot {verb}: its weights depend on the input. It answers "
            "live, save_pretrained() keeps router and adapters, and engine.activate(composition.weights) does the same "
            "elsewhere; for weights that can be merged, compose() with a search"
        )


def pool_of(router: TokenRouter, engine: Composer) -> ExpertPool:
    """The engine's pool as it was given, or bound to the base, where only then it has what the router was made for."""
    wanted, given = set(router.members.hashes), set(Members.of(engine.pool).hashes)
    if wanted <= given or not wanted <= set(Members.of(engine.bound_pool).hashes):
        return engine.pool
    return engine.bound_pool


def saved_router(router: Router) -> TokenRouter:
    """The router, if it is of those that are written to files; else ScopeError."""
    if not isinstance(router, TokenRouter):
        raise ScopeError(
            f"router {router_name(router)!r} is none that loraweave can write to a file: routers of lw.router() are saved"
        )
    return router


def router_name(router: str | Router) -> str:
    """Its name in the registry, or of its class where it is in none; a name is its own."""
    if isinstance(router, str):
        return router
    return router.name if isinstance(router, TokenRouter) else type(router).__name__
