"""Tiny models and pools that the tests of a session share, and the guard that names the test which changes one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from itertools import chain
from typing import Any

import pytest
from torch import Tensor, nn, uint8

from loraweave.hub.pool import ExpertPool

Facts = dict[str, Any]


def facts(thing: nn.Module | ExpertPool) -> Facts:
    """Return, by place, all that a test may change of a model or of a pool's factors.

    Of a tensor: its identity, form, gradient and the digest of its bytes. Of a module: its class, its attributes (mode,
    hooks, children, a forward that stands in for its class's) and those of its configs.
    """
    if isinstance(thing, ExpertPool):
        return {
            f"{name}: {layer}.{part}": _of_tensor(tensor)
            for name, adapter in thing.adapters.items()
            for layer, factors in adapter.layers.items()
            for part, tensor in factors.tensors().items()
        }
    holders: dict[int, tuple[str, Any]] = {}
    for path, module in thing.named_modules():
        holders[id(module)] = path, module
        # most modules have the model's config
        for name in vars(module).keys() & {"config", "generation_config"}:
            holders.setdefault(id(vars(module)[name]), (f"{path}.{name}".lstrip("."), vars(module)[name]))
    attributes = {path: {"__class__": type(value), **_copied(vars(value))} for path, value in holders.values()}
    tensors = chain(thing.named_parameters(), thing.named_buffers())
    return attributes | {name: _of_tensor(tensor) for name, tensor in tensors}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | set):
        return value.copy()
    # tensors that are equal have no truth value
    return id(value) if isinstance(value, Tensor) else value


def _of_tensor(tensor: Tensor) -> tuple[object, ...]:
    digest = hashlib.blake2b(tensor.detach().contiguous().view(uint8).numpy()).digest()
    return id(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, tensor.grad is None, digest


def differences(before: Facts, after: Facts) -> list[str]:
    """Return the places whose facts differ."""
    if before == after:
        return []
    places = []
    for place in before | after:
        old, new = before.get(place), after.get(place)
        if isinstance(old, dict) and isinstance(new, dict):
            places += [f"{place}.{name}".lstrip(".") for name in old | new if old.get(name) != new.get(name)]
        elif old != new:
            places.append(place)
    return places


class Shared:
    """What the tests of a session share: built when a test first asks for it, checked before and after each that has it."""

    def __init__(self) -> None:
        self._built: dict[str, tuple[Any, Facts]] = {}
        self._lent: list[str] = []

    def lend(self, name: str, build: Callable[[], Any]) -> Any:
        """Return the thing of that name for the test that runs; `build` makes the first."""
        if name not in self._lent:
            self._check(name, "something between two tests")
            self._lent.append(name)
        if name not in self._built:
            thing = build()
            self._built[name] = thing, facts(thing)
        return self._built[name][0]

    def take_back(self, test: str) -> None:
        """Check all that this test had; what it changed is built anew for the next."""
        while self._lent:
            self._check(self._lent.pop(), test)

    def _check(self, name: str, who: str) -> None:
        if name not in self._built:
            return
        thing, before = self._built[name]
        if places := differences(before, facts(thing)):
            del self._built[name]
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            pytest.fail(
                f"{who} changed the shared {name}: {', '.join(places[:3])}{more}; "
                "mark a test that does with own_models, or let it ask make_model for its own",
                pytrace=False,
            )


_SHARED = pytest.StashKey[Shared]()


@pytest.fixture
def share_in_session(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Any]], Any]:
    """share_in_session("llama", build): the session's thing of that name; a new one for a test that is marked own_models."""
    if request.node.get_closest_marker("own_models"):
        return lambda name, build: build()
    return request.config.stash.setdefault(_SHARED, Shared()).lend


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    # after all fixtures of the test, some of which put back what it replaced
    try:
        return (yield)
    finally:
        item.config.stash.setdefault(_SHARED, Shared()).take_back(item.name)
