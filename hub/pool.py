"""A pool: adapters of one base model side by side, their rank rows concatenated layer by layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from loraweave.common.names import unknown_expert
from loraweave.errors import AdapterUnsupported, BaseModelMismatch, InvalidLicense, LayerMismatch, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.licenses import require_one_work, stated_license
from loraweave.lowrank.algebra import components
from loraweave.types import BaseKey, Factors


@dataclass(frozen=True, eq=False)
class StackedFactors:
    """The factors of one layer of a pool: a_SI and b_OS of all experts concatenated, `owner_S` the expert of each rank row.

    An expert without this layer owns no row. `gain_EO` and `bias_EO` have a row per expert, zero if it has none.
    """

    a_SI: Tensor
    b_OS: Tensor
    owner_S: Tensor
    gain_EO: Tensor | None = None
    bias_EO: Tensor | None = None


@dataclass(frozen=True, eq=False, init=False)
class ExpertPool:
    """Adapters as experts, in a fixed order, made from a list of adapters or a mapping of names (free text) to adapters.

    Raises WeightingError for an empty pool, a repeated name or anything but an adapter, BaseModelMismatch if two experts
    contradict each other about their base model, LayerMismatch if they update one layer with different shapes. A `lazy`
    pool knows only the names and opens an adapter when it is used; the Composer then compares each adapter with the model
    at its first use, instead of the last two checks.
    """

    adapters: Mapping[str, Adapter]

    def __init__(self, adapters: Iterable[Adapter] | Mapping[str, Adapter]) -> None:
        if not isinstance(adapters, OnDemand):
            adapters = MappingProxyType(_named(adapters))
        if not adapters:
            raise WeightingError("the pool is empty: it needs at least one adapter")
        object.__setattr__(self, "adapters", adapters)
        if not self.lazy:
            require_one_base(adapters)

    @classmethod
    def of(cls, given: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]) -> ExpertPool:
        """Return `given` itself if it is a pool, else a pool of it."""
        return given if isinstance(given, ExpertPool) else cls(given)

    @classmethod
    def on_demand(cls, names: Iterable[str], opener: Callable[[str], Adapter]) -> ExpertPool:
        """Return the lazy pool of these names; `opener` returns the same adapter every time, to any thread.

        The 32 adapters used last stay open. `Hub.pool(lazy=True)` makes such a pool of a hub.
        """
        return cls(OnDemand(names, opener))

    @property
    def lazy(self) -> bool:
        """True if adapters are opened when they are used, and dropped again."""
        return isinstance(self.adapters, OnDemand)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    @property
    def base_model(self) -> str:
        return next(iter(self.adapters.values())).base_model

    def __len__(self) -> int:
        return len(self.adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __getitem__(self, name: str) -> Adapter:
        self.known([name])
        return self.adapters[name]

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertPool:
        # a pool never changes
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.lazy:
            raise AdapterUnsupported(
                "a lazy pool has no pickle, since it opens its adapters from a hub of this process: make it in the other "
                "process, by Hub(path).pool(names, lazy=True), or pickle ExpertPool(dict(pool.adapters)), which opens all"
            )
        # a read-only view has no pickle
        return {"adapters": dict(self.adapters)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(adapters=MappingProxyType(state["adapters"]))

    def known(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names as a tuple. Raises UnknownExpert, with the nearest names, for one that the pool lacks."""
        names = tuple(names)
        for name in names:
            if name not in self.adapters:
                raise unknown_expert(name, self.names)
        return names

    def subset(self, names: Iterable[str]) -> ExpertPool:
        """Return the pool of the named experts, in the order given; lazy if this one is."""
        if isinstance(self.adapters, OnDemand):
            return ExpertPool(self.adapters.subset(self.known(names)))
        return ExpertPool({name: self[name] for name in names})

    def including(self, name: str, adapter: Adapter) -> ExpertPool:
        """Return this pool with one more expert at its end, or in the place of the one with that name."""
        if isinstance(self.adapters, OnDemand):
            return ExpertPool(self.adapters.including(name, adapter))
        return ExpertPool({**self.adapters, name: adapter})

    def without(self, name: str) -> ExpertPool:
        """Return this pool without one expert. Raises WeightingError if it was the last."""
        self.known([name])
        return self.subset(other for other in self.adapters if other != name)

    def rank_one(self) -> ExpertPool:
        """Return the singular components of every expert as experts of rank 1: "name#1" has the strongest of each layer.

        An expert is the sum of all its components at weight 1. Their cards are its card, with its name under "part_of".
        Raises AdapterUnsupported for an expert with a head, or one that needs its base layer (DoRA): use a Composer's
        bound_pool.
        """
        components_of_all: dict[str, Adapter] = {}
        for name, adapter in self.adapters.items():
            require_no_heads(name, adapter)
            of_layer = {layer: components(factors) for layer, factors in adapter.layers.items()}
            for place in range(max(map(len, of_layer.values()))):
                layers = {layer: parts[place] for layer, parts in of_layer.items() if place < len(parts)}
                part = f"{name}#{place + 1}"
                card = {**adapter.card, "part_of": name}
                components_of_all[part] = replace(adapter, name=part, layers=layers, card=card)
        return ExpertPool(components_of_all)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The index of each expert in the pool, by name."""
        return dict(zip(self.adapters, range(len(self.adapters)), strict=True))

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that at least one expert updates, sorted. A lazy pool opens all its adapters for them."""
        # adapters of one form share its tuple, so that a pool of thousands has few to look at
        forms = {id(adapter.form): adapter.form for adapter in self.adapters.values()}
        return tuple(sorted({layer for form in forms.values() for layer, *_ in form}))

    @cached_property
    def headed(self) -> tuple[str, ...]:
        """The experts that have trained heads; empty for a lazy pool, which opens no adapter for it."""
        return () if self.lazy else tuple(name for name, adapter in self.adapters.items() if adapter.heads)

    @cached_property
    def _invocations(self) -> dict[str, tuple[int, ...]]:
        return {}

    def invocations(self, names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """Return {expert: its invocation tokens} for those of `names` (None: all) with any; a lazy pool opens them all."""
        chosen = self.names if names is None else tuple(names)
        for name in chosen:
            if name not in self._invocations:
                self._invocations[name] = self.adapters[name].invocation
        return {name: tokens for name in chosen if (tokens := self._invocations[name])}

    @cached_property
    def clashing_licenses(self) -> Mapping[str, str | None]:
        """The experts' licenses if no one work can keep to all of them; empty if one can, and for a lazy pool."""
        if self.lazy:
            return {}
        licenses = {name: stated_license(adapter.card.get("license")) for name, adapter in self.adapters.items()}
        try:
            require_one_work(licenses.items())
        except InvalidLicense:
            return licenses
        return {}

    def stacked(self, layer: str) -> StackedFactors:
        """Return a layer's stacked fp32 factors of all experts. Raises AdapterUnsupported if one is unbound or has heads."""
        parts: dict[int, Factors] = {}
        for index, (name, adapter) in enumerate(self.adapters.items()):
            if layer in adapter.layers:
                parts[index] = adapter.layers[layer]
                require_no_heads(name, adapter)
                if not parts[index].bound:
                    raise AdapterUnsupported(
                        f"expert {name!r} is not bound to a base model in layer {layer!r}: take the bound_pool of a "
                        "Composer(model, pool)"
                    )
        if not parts:
            raise LayerMismatch(f"no expert of the pool updates layer {layer!r}; they update {len(self.layer_names)} others")
        return StackedFactors(
            a_SI=torch.cat([factors.a_RI for factors in parts.values()], dim=0),
            b_OS=torch.cat([factors.b_OR for factors in parts.values()], dim=1),
            owner_S=torch.cat([torch.full((factors.rank,), index, dtype=torch.long) for index, factors in parts.items()]),
            gain_EO=_rows(len(self), {index: factors.gain_O for index, factors in parts.items()}),
            bias_EO=_rows(len(self), {index: factors.bias_O for index, factors in parts.items()}),
        )


def require_no_heads(name: str, adapter: Adapter) -> None:
    """Raise AdapterUnsupported if the expert has trained heads, which only live and fused mixtures can use."""
    if adapter.heads:
        raise AdapterUnsupported(
            f"expert {name!r} has a trained head ({', '.join(sorted(adapter.heads))}): a Composer of a pool in memory mixes "
            "and fuses it, but it is searched, routed and merged only without: dataclasses.replace(adapter, heads={})"
        )


def require_everywhere(name: str, adapter: Adapter, what: str) -> None:
    """Raise ScopeError if the expert acts only from its invocation tokens on, and not on every token.

    `what` is the clause of the message that says why it must act on every token.
    """
    if adapter.invocation:
        raise ScopeError(
            f"expert {name!r} acts only from its invocation tokens {list(adapter.invocation)} on, but {what}: activate() or "
            "generate() with it, or take dataclasses.replace(adapter, invocation=()), which acts on every token"
        )


def _rows(num_experts: int, parts: Mapping[int, Tensor | None]) -> Tensor | None:
    present = {index: tensor for index, tensor in parts.items() if tensor is not None}
    if not present:
        return None
    rows_EO = torch.zeros(num_experts, len(next(iter(present.values()))))
    for index, tensor in present.items():
        rows_EO[index] = tensor
    return rows_EO


def _named(adapters: object) -> dict[str, Adapter]:
    """Return a list or mapping of adapters as {name: adapter}. Raises WeightingError for other input or a repeated name."""
    if not isinstance(adapters, Iterable):
        raise WeightingError(f"a pool is made of a list of adapters or of {{name: adapter}}, not of {adapters!r:.80}")
    listed = list(adapters.values() if isinstance(adapters, Mapping) else adapters)
    for adapter in listed:
        if not isinstance(adapter, Adapter):
            raise WeightingError(
                f"a pool is made of adapters, but one of them is {adapter!r:.80}: Adapter.from_pretrained() opens a folder, "
                "and a hub's pool() those that it stores"
            )
    if isinstance(adapters, Mapping):
        return dict(adapters)
    _require_distinct([adapter.name for adapter in listed], "pass a mapping with distinct names")
    return {adapter.name: adapter for adapter in listed}


def _require_distinct(names: Sequence[str], way_out: str) -> None:
    if len(set(names)) != len(names):
        twice = min(name for name, count in Counter(names).items() if count > 1)
        raise WeightingError(f"the pool has several adapters named {twice!r}; {way_out}")


def require_one_base(adapters: Mapping[str, Adapter]) -> None:
    """Raise BaseModelMismatch or LayerMismatch for adapters that contradict each other about the base or a layer's shape."""
    seen: dict[str, tuple[str, tuple[int, int, str, tuple[int, ...]]]] = {}
    forms: set[int] = set()
    bases: dict[BaseKey, str] = {}
    for name, adapter in adapters.items():
        if adapter.base not in bases:
            for base, first in bases.items():
                if why := base.contradicts(adapter.base):
                    raise BaseModelMismatch(
                        f"experts {first!r} (for {base.id!r}) and {name!r} (for {adapter.base_model!r}) were made for "
                        f"different base models: {why}"
                    )
            bases[adapter.base] = name
        if id(adapter.form) in forms:
            continue
        forms.add(id(adapter.form))
        for layer, num_out, num_in, kind, kernel, _ in adapter.form:
            shape = (num_out, num_in, kind, kernel)
            # a trained bias alone is stored without the layer's kind and number of inputs
            if not num_in:
                continue
            other, known = seen.setdefault(layer, (name, shape))
            if shape != known:
                raise LayerMismatch(
                    f"experts {other!r} and {name!r} update layer {layer!r} with (O, I, kind, kernel) {known} and {shape}"
                )


# an open adapter is hundreds of views of mapped memory, about half a megabyte of objects
NUM_KEPT = 32


class OnDemand(Mapping[str, Adapter]):
    """Adapters by name, in the order of `names`, opened by `opener`; the `num_kept` used last stay open.

    An adapter that is still referenced is the same object when it is used again. `opener` must return the same content every
    time; several threads may call it at once. Raises WeightingError for a repeated name, and what `opener` raises.
    """

    def __init__(self, names: Iterable[str], opener: Callable[[str], Adapter], *, num_kept: int = NUM_KEPT) -> None:
        listed = tuple(names)
        # a dict for the order and for look-ups; None stands for an adapter to open on demand
        self._adapters: dict[str, Adapter | None] = dict.fromkeys(listed)
        _require_distinct(listed, "give every name once")
        self._open, self._alive = _kept_open(opener, num_kept)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name] or self._open(name)

    def __contains__(self, name: object) -> bool:
        # Mapping's own __contains__ would open it
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def num_open(self) -> int:
        """The number of adapters that are open, because they were used lately or are still referenced."""
        return len(self._alive)

    def subset(self, names: Iterable[str]) -> OnDemand:
        """Return the named adapters, in the order given."""
        return self._sharing({name: self._adapters[name] for name in names})

    def including(self, name: str, adapter: Adapter) -> OnDemand:
        """Return these adapters and one in memory, in the place of the adapter with that name or at the end."""
        return self._sharing(self._adapters | {name: adapter})

    def __repr__(self) -> str:
        return f"OnDemand({len(self):,} adapters, {self.num_open:,} open)"

    def _sharing(self, adapters: dict[str, Adapter | None]) -> Self:
        other = object.__new__(type(self))
        other._adapters, other._open, other._alive = adapters, self._open, self._alive
        return other


def _kept_open(opener: Callable[[str], Adapter], num_kept: int) -> tuple[Callable[[str], Adapter], Sized]:
    """Return a function that opens a named adapter, or returns it if it is open, and the collection of open adapters."""
    alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
    lock = threading.Lock()

    @lru_cache(num_kept)
    def adapter(name: str) -> Adapter:
        # outside the lock, so that others need not wait for this file
        opened = alive.get(name) or opener(name)
        with lock:
            return alive.setdefault(name, opened)

    return adapter, alive
