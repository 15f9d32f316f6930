"""With which weights a model answers a router that looks at a call before it runs: as the base, or as the router says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from loraweave.errors import ScopeError
from loraweave.routers.routing.holding import holding

Answering = Callable[[Mapping[str, float]], AbstractContextManager[None]]

_ANSWERING: ContextVar[Answering | None] = ContextVar("loraweave_answering", default=None)


def answering(with_weights: Answering) -> AbstractContextManager[None]:
    """Inside, `under` is this."""
    return holding(_ANSWERING, with_weights)


@contextmanager
def under(weights: Mapping[str, float]) -> Iterator[None]:
    """Inside, the model answers with {name: weight}. Raises ScopeError outside a Composer's call."""
    found = _ANSWERING.get()
    if found is None:
        raise ScopeError(
            "a router looks at the model under a mixture only inside a call that a Composer sees: activate() it"
        )
    with found(weights):
        yield


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, the experts are known by the keys instead of the values."""
    found = _ANSWERING.get()
    if found is None:
        yield
        return
    with answering(lambda weights: found({names[name]: weight for name, weight in weights.items()})):
        yield
