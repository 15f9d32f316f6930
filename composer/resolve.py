"""What `activate` takes, as weights over the experts of a pool or as the router that it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraweave.errors import UnknownExpert, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router


def resolve(mixture: Any, pool: ExpertPool) -> MixtureWeights | Router:
    """What activate() takes, as weights in the order of the pool's experts, or as the router that it is.

    Raises WeightingError for anything else, UnknownExpert for a name that the pool has not.
    """
    if isinstance(mixture, MixtureWeights):
        return _aligned(mixture, pool)
    if isinstance(mixture, Mapping):
        return MixtureWeights.of(mixture, pool.names)
    if callable(getattr(mixture, "weights", None)):
        return mixture  # type: ignore[no-any-return]
    if isinstance(mixture, Iterable) and not isinstance(mixture, str):
        rows = list(mixture)
        if all(row is None or isinstance(row, Mapping) for row in rows):
            return MixtureWeights.of(rows, pool.names)
    raise WeightingError(
        f"a mixture is {{name: weight}}, a list with one of these (None: the base) per row, MixtureWeights or a router, "
        f"not {mixture!r}; {{}} is the base model"
    )


def _aligned(mixture: MixtureWeights, pool: ExpertPool) -> MixtureWeights:
    if len(set(mixture.experts)) != len(mixture.experts):
        raise WeightingError(f"the mixture names an expert twice: {', '.join(map(repr, mixture.experts))}")
    for name in mixture.experts:
        if name not in pool.adapters:
            raise UnknownExpert(f"no expert {name!r} in the pool; it has {', '.join(map(repr, pool.names))}")
    place = {name: index for index, name in enumerate(pool.names)}
    known = set(pool.layer_names)
    for index, layer in enumerate(mixture.layers):
        if layer not in known and bool((mixture.values_BTLE[:, :, index] != 0).any()):
            raise WeightingError(f"the mixture gives weights to layer {layer!r}, which no expert of the pool updates")
    # in the order of the pool, so that one set of experts is one set, and gives the same bits, however it was named
    order = sorted(range(len(mixture.experts)), key=lambda index: place[mixture.experts[index]])
    return MixtureWeights(mixture.values_BTLE[..., order], tuple(mixture.experts[index] for index in order), mixture.layers)
