"""States kept beside key-value caches, which change as the caches do: beams reordered, tokens cropped, rows repeated.

While an activation is open, a followed cache has a subclass of its class, which replaces the five methods below; nothing is
added to the object, and it gets its own class back when the activation ends. A copy or a pickle has the cache's own class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any, Generic, Protocol, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import Tensor

from loraweave.common.process import holding
from loraweave.errors import ScopeError


class Follower(Protocol):
    """A state with the methods that change a cache. A DynamicCache is a follower, too."""

    def get_seq_length(self) -> int: ...

    def reorder_cache(self, beam_idx: Tensor, /) -> None: ...

    def crop(self, tokens_to_remove: int, /) -> None: ...

    def batch_repeat_interleave(self, repeats: int, /) -> None: ...

    def batch_select_indices(self, indices: Tensor, /) -> None: ...

    def reset(self) -> None: ...


S = TypeVar("S", bound=Follower)


class BesideCache(Generic[S]):
    """A mapping from each cache to a state that changes as the cache does: reordered, cropped, repeated, selected, reset.

    A state belongs to the cache, not to the call, so that threads and conversations have separate states. It is forgotten
    with its cache. `router` is the router's name for messages.
    """

    def __init__(self, router: str) -> None:
        self._router = router

    def of(self, cache: Any) -> S | None:
        """Return the state beside a cache, with as many tokens as the cache; None for an empty cache.

        Raises ScopeError for a kind of cache that cannot be followed, and for a cache with tokens that the router has not
        seen.
        """
        state = self.known(cache)
        num_tokens = int(cache.get_seq_length())
        known = 0 if state is None else state.get_seq_length()
        if known < num_tokens:
            raise ScopeError(
                f"router {self._router!r} has to see every token of a cache, but of the {num_tokens} in this one it has "
                f"seen {known}: begin with an empty cache inside the activation, and give no other mixture in between"
            )
        return state

    def known(self, cache: Any) -> S | None:
        """Return the state beside a cache, which may have fewer tokens; None if there is none, or the cache is empty.

        Raises ScopeError for a kind of cache that cannot be followed.
        """
        self._require_followable(cache)
        num_tokens = int(cache.get_seq_length())
        state: S | None = follower(cache, self) if num_tokens else None
        # a call that was broken off before the cache took its tokens
        if state is not None and state.get_seq_length() > num_tokens:
            crop(state, state.get_seq_length() - num_tokens)
        return state

    def keep(self, cache: Any | None, state: S) -> None:
        """Keep the state beside the cache from now on; for None, beside the cache that the running call returns, if any."""
        if cache is not None:
            follow(cache, self, state)
        elif (current := _CURRENT.get()) is not None:
            current.wait(self, state)

    def _require_followable(self, cache: Any) -> None:
        from transformers.cache_utils import BaseQuantizedLayer, Cache, DynamicLayer

        kind, layers = type(cache).__name__, getattr(cache, "layers", ())
        unlike = [layer for layer in layers if not isinstance(layer, DynamicLayer) or isinstance(layer, BaseQuantizedLayer)]
        replaced = [name for name in METHODS if name in getattr(cache, "__dict__", {})]
        if not isinstance(cache, Cache) or not hasattr(cache, "layers") or replaced:
            why = f"whose {replaced[0]} was replaced" if replaced else "which is not a transformers cache with layers"
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


class RowsAndTokens(ABC):
    """A follower made of tensors whose first axes are rows and tokens, all of which change as the cache does."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Return the number of tokens in each row."""

    @abstractmethod
    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by what `make` returns for it."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        num_left = self.get_seq_length() - abs(tokens_to_remove)
        self.change(lambda tensor: tensor[:, :num_left])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        self.change(lambda tensor: tensor[:, :0])


METHODS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")

# {cache: {owner: its state}}
_FOLLOWERS: WeakKeyDictionary[Any, WeakKeyDictionary[object, Any]] = WeakKeyDictionary()

# {class of a cache: its followed twin}
_KINDS: dict[Any, type] = {}

# the tensors that a cache had when it was last followed
_LAST_TENSORS: WeakKeyDictionary[Any, list[ReferenceType[Tensor]]] = WeakKeyDictionary()


class FollowedCaches:
    """The caches whose changes (beams reordered, tokens cropped) reach the states beside them in one activation."""

    def __init__(self) -> None:
        self._caches: WeakSet[Any] = WeakSet()
        # (owner, state) pairs for the cache that the running call makes
        self._waiting: list[tuple[object, Any]] = []

    def entered(self) -> AbstractContextManager[None]:
        """Collect the caches that get a state beside them inside the context."""
        self._waiting.clear()
        return holding(_CURRENT, self)

    def add(self, cache: Any) -> None:
        self._caches.add(cache)

    def wait(self, owner: object, state: Follower) -> None:
        self._waiting.append((owner, state))

    def returned(self, output: Any) -> None:
        """Put waiting states beside the new cache in `output`, the result of a model call that began without a cache."""
        if not self._waiting:
            return
        from transformers import DynamicCache

        match output:
            case Mapping():
                values = tuple(output.values())
            case tuple():
                values = output
            case _:
                values = ()
        cache = next((value for value in values if isinstance(value, DynamicCache)), None)
        for owner, state in self._waiting:
            if cache is not None and cache.get_seq_length() == state.get_seq_length():
                follow(cache, owner, state)
                self.add(cache)
        self._waiting.clear()

    def release(self) -> None:
        """Stop changing states with their caches. A cache that is the same later gets its states back."""
        for cache in list(self._caches):
            self._caches.discard(cache)
            _release(cache)


_CURRENT: ContextVar[FollowedCaches | None] = ContextVar("loraweave_followed_caches", default=None)


def follower(cache: Any, owner: object) -> Any:
    """Return the owner's state beside a cache; None if there is none, or if the cache changed while it was not followed."""
    if cache not in _FOLLOWERS:
        return None
    if not _is_followed(cache):
        before, now = _LAST_TENSORS.get(cache), _tensors(cache)
        if before is None or len(before) != len(now) or any(a() is not b for a, b in zip(before, now, strict=True)):
            del _FOLLOWERS[cache]
            return None
    return _FOLLOWERS[cache].get(owner)


def follow(cache: Any, owner: object, state: Follower) -> None:
    """Keep the owner's `state` beside the cache, changing as the cache does until the activation ends."""
    _FOLLOWERS.setdefault(cache, WeakKeyDictionary())[owner] = state
    if not _is_followed(cache):
        kind = type(cache)
        cache.__class__ = _KINDS.setdefault(kind, _KINDS.get(kind) or _followed(kind))
    if (current := _CURRENT.get()) is not None:
        current.add(cache)


def _release(cache: Any) -> None:
    if _is_followed(cache):
        _LAST_TENSORS[cache] = [ref(tensor) for tensor in _tensors(cache)]
        cache.__class__ = type(cache).__bases__[0]


def _is_followed(cache: Any) -> bool:
    return "_loraweave_follows" in vars(type(cache))


def _tensors(cache: Any) -> list[Tensor]:
    return [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _followed(kind: Any) -> type:
    methods: dict[str, Any] = {name: _following(kind, name) for name in METHODS}

    def deep_copied(cache: Any, memo: dict[int, Any]) -> Any:
        copied = memo[id(cache)] = _empty(kind)
        copied.__dict__.update(deepcopy(vars(cache), memo))
        _FOLLOWERS[copied] = WeakKeyDictionary(
            {owner: deepcopy(state, memo) for owner, state in _FOLLOWERS.get(cache, {}).items()}
        )
        _LAST_TENSORS[copied] = [ref(tensor) for tensor in _tensors(copied)]
        return copied

    def reduced(cache: Any, protocol: Any) -> Any:
        return _empty, (kind,), vars(cache)

    special_methods = {
        "__deepcopy__": deep_copied,
        "__reduce_ex__": reduced,
        "__module__": kind.__module__,
        "_loraweave_follows": True,
    }
    return type(kind.__name__, (kind,), methods | special_methods)


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


def _following(kind: Any, name: str) -> Callable[..., None]:
    """Return a method that calls the cache's own method of that name, then changes its followers likewise."""
    original = getattr(kind, name)

    def method(cache: Any, *args: Any, **kwargs: Any) -> None:
        num_before = cache.get_seq_length()
        original(cache, *args, **kwargs)
        for state in list(_FOLLOWERS.get(cache, {}).values()):
            if name == "crop":
                crop(state, num_before - cache.get_seq_length())
            else:
                getattr(state, name)(*args, *kwargs.values())

    return method


def crop(state: Follower, num_tokens: int) -> None:
    """Remove the last `num_tokens` tokens from a follower."""
    # a layer that records tokens beyond its window drops them only when it is cropped, be it by 0
    if num_tokens or any(getattr(layer, "record_past", False) for layer in getattr(state, "layers", ())):
        state.crop(-num_tokens)
