"""The experts of a router without their tensors, their indices in a pool, and tensors by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from loraweave.common.names import unknown_expert
from loraweave.errors import BaseModelMismatch, LayerMismatch, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import BaseKey, Fingerprint, Kind

# the most names that a message lists
NUM_SHOWN = 6

# members by pool; a pool never changes
_KNOWN: WeakKeyDictionary[ExpertPool, Members] = WeakKeyDictionary()


@dataclass(frozen=True)
class RoutedLayer:
    """A layer of a pool: its numbers of inputs and outputs, and the indices of the experts that update it."""

    num_inputs: int
    num_outputs: int
    kind: Kind
    experts: tuple[int, ...]

    @property
    def form(self) -> tuple[int, int, Kind]:
        return self.num_inputs, self.num_outputs, self.kind


@dataclass(frozen=True, eq=False)
class Members:
    """A pool's experts without their tensors: names, content hashes, base model, and the layers they update."""

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    base_model: str
    fingerprint: Fingerprint | None
    layers: Mapping[str, RoutedLayer]

    @classmethod
    def of(cls, pool: ExpertPool | Members) -> Members:
        """Return a pool's members, computed once; a lazy pool opens all its adapters. Members are returned unchanged."""
        if isinstance(pool, Members):
            return pool
        if pool not in _KNOWN:
            _KNOWN[pool] = cls._of(pool)
        return _KNOWN[pool]

    @staticmethod
    def pool_of(experts: ExpertPool | Members) -> ExpertPool | None:
        """Return the pool that a router is made for; None for `Members`, whose tensors are then loaded from a file."""
        return None if isinstance(experts, Members) else experts

    @classmethod
    def _of(cls, pool: ExpertPool) -> Members:
        places: dict[str, list[int]] = {}
        shapes: dict[str, tuple[int, int, Kind]] = {}
        for place, adapter in enumerate(pool.adapters.values()):
            for layer, num_outputs, num_inputs, kind, *_ in adapter.form:
                places.setdefault(layer, []).append(place)
                # a trained bias alone is stored without the layer's kind and number of inputs
                if num_inputs or layer not in shapes:
                    shapes[layer] = (num_inputs, num_outputs, kind)
        layers = {layer: RoutedLayer(*shapes[layer], tuple(places[layer])) for layer in sorted(places)}
        adapters = list(pool.adapters.values())
        known = next((adapter.fingerprint for adapter in adapters if adapter.fingerprint), None)
        return cls(pool.names, tuple(a.hash for a in adapters), pool.base_model, known, MappingProxyType(layers))

    def same_experts(self, pool: ExpertPool) -> bool:
        """Return True if a pool has these experts, with the same contents and names in the same order."""
        other = Members.of(pool)
        return (self.names, self.hashes) == (other.names, other.hashes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Members:
        # nothing of it ever changes
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a read-only view has no pickle
        fields = {name: getattr(self, name) for name in ("names", "hashes", "base_model", "fingerprint")}
        return {**fields, "layers": dict(self.layers)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, layers=MappingProxyType(state["layers"]))

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The index of each expert, by name."""
        return {name: place for place, name in enumerate(self.names)}

    @property
    def base(self) -> BaseKey:
        return BaseKey(self.base_model, None, self.fingerprint)

    @property
    def most_frequent_size(self) -> int:
        """The most frequent number among the layers' inputs and outputs; the smallest if several are."""
        counts = Counter(size for layer in self.layers.values() for size in (layer.num_inputs, layer.num_outputs))
        return min(size for size, count in counts.items() if count == max(counts.values()))

    def without(self, name: str) -> Members:
        """Return all members but one, in order. Raises UnknownExpert for an unknown name, WeightingError for the last."""
        if name not in self.places:
            raise unknown_expert(name, self.names)
        if len(self.names) == 1:
            raise WeightingError(f"{name!r} is the only expert of the router: one without any has nothing to weigh")
        gone = self.places[name]
        layers = {
            layer: replace(routed, experts=tuple(place - (place > gone) for place in routed.experts if place != gone))
            for layer, routed in self.layers.items()
        }
        left = {layer: routed for layer, routed in layers.items() if routed.experts}
        return replace(self, names=_omit(self.names, gone), hashes=_omit(self.hashes, gone), layers=MappingProxyType(left))

    def including(self, name: str, adapter: Adapter) -> Members:
        """Return the members with one more at the end.

        Raises WeightingError for a name that is taken, BaseModelMismatch for an adapter of another base, LayerMismatch if
        the adapter gives a layer another shape.
        """
        if name in self.places:
            raise WeightingError(f"the router has an expert {name!r} already: remove it first, or give another name")
        added = Members.of(ExpertPool({name: adapter}))
        if why := self.base.differs(added.base):
            raise BaseModelMismatch(f"expert {name!r} was made for another base model than the router's: {why}")
        layers = dict(self.layers)
        for layer, new in added.layers.items():
            old = layers.get(layer, replace(new, experts=()))
            # a trained bias alone is stored without the layer's kind and number of inputs
            if new.num_inputs and old.num_inputs and old.form != new.form:
                raise LayerMismatch(
                    f"expert {name!r} updates layer {layer!r} with (I, O, kind) {new.form}, the others {old.form}"
                )
            shaped = old if old.num_inputs else new
            layers[layer] = replace(shaped, experts=(*old.experts, len(self.names)))
        return Members(
            (*self.names, name),
            (*self.hashes, adapter.hash),
            self.base_model,
            self.fingerprint or adapter.fingerprint,
            MappingProxyType(dict(sorted(layers.items()))),
        )

    def to_json(self) -> dict[str, Any]:
        layers = {
            name: [layer.num_inputs, layer.num_outputs, layer.kind, list(layer.experts)]
            for name, layer in self.layers.items()
        }
        return {
            "experts": [list(pair) for pair in zip(self.names, self.hashes, strict=True)],
            "base_model": self.base_model,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_json(),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read members from JSON. Raises KeyError, ValueError or TypeError for data of another form."""
        names, hashes = zip(*((str(name), str(digest)) for name, digest in data["experts"]), strict=True)
        layers = {
            str(name): RoutedLayer(int(num_inputs), int(num_outputs), kind, tuple(map(int, experts)))
            for name, (num_inputs, num_outputs, kind, experts) in data["layers"].items()
        }
        if len(set(names)) < len(names):
            raise ValueError("an expert is named twice")
        for name, routed in layers.items():
            if len(set(routed.experts)) < len(routed.experts):
                raise ValueError(f"layer {name!r} names an expert twice: {routed.experts}")
            if not routed.experts or not set(routed.experts) <= set(range(len(names))) or routed.kind not in get_args(Kind):
                raise ValueError(f"layer {name!r} is said to be of kind {routed.kind!r}, of experts {routed.experts}")
        stored = data["fingerprint"]
        known = None if stored is None else Fingerprint.from_json(stored)
        return cls(names, hashes, str(data["base_model"]), known, MappingProxyType(layers))


def _omit(values: tuple[str, ...], place: int) -> tuple[str, ...]:
    return (*values[:place], *values[place + 1 :])


def find_names(members: Members, pool: ExpertPool, router: str) -> list[str]:
    """Return the pool's name of each of a router's own experts, in the router's order; `router` is its name.

    Raises BaseModelMismatch for a pool of another base, WeightingError, listing the differences, for a pool that lacks
    some of the experts.
    """
    other = Members.of(pool)
    if why := members.base.differs(other.base):
        raise BaseModelMismatch(f"router {router!r} was made for another base model than the pool's: {why}")
    matches = _match_experts(members, other)
    if None in matches:
        raise WeightingError(
            f"router {router!r} is for other experts than the pool's: {_tell_apart(members, other, matches)}"
        )
    return [name for name in matches if name is not None]


def _match_experts(members: Members, other: Members) -> list[str | None]:
    """Return each expert's match by content in `other`: of the same name, else the first unused; None if none."""
    by_hash: dict[str, list[str]] = {}
    for name, digest in zip(other.names, other.hashes, strict=True):
        by_hash.setdefault(digest, []).append(name)
    matches: list[str | None] = []
    for name, digest in zip(members.names, members.hashes, strict=True):
        same = by_hash.get(digest, [])
        chosen = name if name in same else next((one for one in same if one not in members.places), None)
        matches.append(chosen or (same[0] if same else None))
        if matches[-1] is not None:
            same.remove(matches[-1])
    return matches


def _tell_apart(members: Members, other: Members, matches: Sequence[str | None]) -> str:
    lacking = [name for name, match in zip(members.names, matches, strict=True) if match is None]
    missing = [name for name in lacking if name not in other.places]
    changed = [name for name in lacking if name in other.places]
    extra = [name for name in other.names if name not in matches and name not in members.places]
    groups = (("missing from the pool", missing), ("of other content there", changed), ("not known to the router", extra))
    listed = "; ".join(f"{what}: {_list_some(names)}" for what, names in groups if names)
    layers = sorted(set(members.layers) ^ set(other.layers))
    apart = f"; {len(layers)} layers are updated by one of the two alone, the first {layers[0]!r}" if layers else ""
    return (
        f"{listed}{apart}. Give it the adapters that it was made for (a folder saved with pool= has them), or make a router "
        "for this pool"
    )


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(map(repr, names[:NUM_SHOWN])) + more


class LayerTensors(nn.Module):
    """A mapping {layer: tensor}, of parameters if `learned`. Loading a file replaces all of them."""

    def __init__(self, tensors: Mapping[str, Tensor], *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        for layer, tensor in tensors.items():
            self[layer] = tensor

    def __setitem__(self, layer: str, tensor: Tensor) -> None:
        key = _key(layer)
        if self.learned:
            self._parameters[key] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        else:
            self._buffers[key] = tensor

    def __getitem__(self, layer: str) -> Tensor:
        tensor: Tensor = self._tensors[_key(layer)]
        return tensor

    def __delitem__(self, layer: str) -> None:
        del self._tensors[_key(layer)]

    def __contains__(self, layer: object) -> bool:
        return _key(str(layer)) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (_layer(key) for key in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._parameters if self.learned else self._buffers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            self[_layer(name.removeprefix(prefix))] = state_dict[name].clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _key(layer: str) -> str:
    # torch reads a dot in a name as a submodule
    return layer.replace(".", "/")


def _layer(key: str) -> str:
    return key.replace("/", ".")
