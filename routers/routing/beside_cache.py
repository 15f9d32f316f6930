"""What a router keeps beside the key-value cache of whoever calls the model: of the tokens that the cache has seen."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from loraweave.errors import ScopeError
from loraweave.routers.routing.followed_caches import METHODS, Follower, crop, follow, follow_returned, follower

S = TypeVar("S", bound=Follower)


class BesideCache(Generic[S]):
    """One state for each cache, which is changed as that is: reordered, cropped, repeated, selected, reset.

    It is the cache's and not the call's, so that threads and conversations do not see each other's. A state is forgotten
    with its cache. `router` is the name for messages.
    """

    def __init__(self, router: str) -> None:
        self._router = router

    def of(self, cache: Any) -> S | None:
        """The state beside a cache, of as many tokens as that; None for a cache that is empty.

        Raises ScopeError for a kind of cache that cannot be followed, and for one that took tokens without this router.
        """
        self._require_followable(cache)
        num_tokens = int(cache.get_seq_length())
        if num_tokens == 0:
            return None
        state: S | None = follower(cache, self)
        known = 0 if state is None else state.get_seq_length()
        if state is None or known < num_tokens:
            raise ScopeError(
                f"router {self._router!r} has to see every token of a cache, but of the {num_tokens} in this one it has "
                f"seen {known}: begin with an empty cache inside the activation, and give no other mixture in between"
            )
        # a call that was broken off before the cache took its tokens
        if known > num_tokens:
            crop(state, known - num_tokens)
        return state

    def keep(self, cache: Any, state: S) -> None:
        """Keeps the state beside the cache from now on."""
        follow(cache, self, state)

    def keep_returned(self, state: S) -> None:
        """Keeps the state beside the cache that the running call makes, if it gives one back."""
        follow_returned(self, state)

    def _require_followable(self, cache: Any) -> None:
        from transformers.cache_utils import BaseQuantizedLayer, Cache, DynamicLayer

        kind, layers = type(cache).__name__, getattr(cache, "layers", ())
        unlike = [layer for layer in layers if not isinstance(layer, DynamicLayer) or isinstance(layer, BaseQuantizedLayer)]
        replaced = [name for name in METHODS if name in getattr(cache, "__dict__", {})]
        if not isinstance(cache, Cache) or not hasattr(cache, "layers") or replaced:
            why = f"whose {replaced[0]} was replaced" if replaced else "which is no cache of transformers with layers"
        elif unlike:
            why = f"with layers of class {type(unlike[0]).__name__}"
        elif getattr(cache, "offloading", False):
            why = "which is offloaded"
        else:
            return
        raise ScopeError(
            f"router {self._router!r} keeps a state beside the cache and can follow a DynamicCache, but this is a {kind}, "
            f"{why}: leave cache_implementation out, pass a DynamicCache, or generate with use_cache=False"
        )
