"""A mixture that is written into the weights: what each layer gets of it, and the way to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loraweave.composer import fused
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.live.license_notice import warn_of_licenses
from loraweave.composer.live.resolve import resolve
from loraweave.composer.merge.merge import layer_updates
from loraweave.composer.merge.method_call import MethodCall
from loraweave.composer.merge.statistics import Statistics
from loraweave.composer.merge.updates import TruncatedUpdate
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights


class FusedMixture:
    """What `Composer.fused` gives its block: the mixture that is in the weights, and the way to another one."""

    def __init__(self, updates: Callable[..., Iterator[fused.Update]], fusion: fused.Fusion) -> None:
        self._updates = updates
        self._fusion = fusion

    @property
    def original_bytes(self) -> int:
        """Bytes that the originals take, where they were asked to be kept."""
        return self._fusion.originals.num_bytes

    def switch(
        self,
        mixture: Any,
        *,
        method: str = "linear",
        seed: int = 0,
        statistics: Mapping[str, Statistics] | None = None,
        **options: Any,
    ) -> None:
        """Another mixture in place of this one: originals and update in one pass, without restoring in between.

        Raises what `fused` raises, and CompositionError after the block's end or when someone else changed a fused weight.
        A mixture, method or option that is refused changes nothing; an error while writing, or an interruption, leaves the
        base's own weights.
        """
        self._fusion.write(self._updates(mixture, method, seed, statistics, options))


def mixture_updates(
    pool: ExpertPool,
    bound: ExpertPool,
    fitting: Fitting,
    mixture: Any,
    method: str,
    seed: int,
    statistics: Mapping[str, Statistics] | None,
    options: Mapping[str, Any],
) -> Iterator[fused.Update]:
    """What `method` makes of a task-scope mixture, for every layer that it changes; one is held at a time."""
    weights = resolve(mixture, pool)
    if not isinstance(weights, MixtureWeights) or weights.scope != "task":
        scope = weights.scope if isinstance(weights, MixtureWeights) else f"router {type(weights).__name__}"
        raise ScopeError(f"cannot fuse weights that vary with the input ({scope}): activate() them instead")
    warn_of_licenses(weights, pool)
    call = MethodCall(method, options)
    used = weights.values_BTLE[0, 0].any(dim=0).nonzero()[:, 0].tolist()
    experts = {weights.experts[place]: bound.adapters[weights.experts[place]].layers for place in used}
    # after the experts, since those of a lazy pool bring their layers along
    layers = fitting.layers
    per_layer: dict[str, dict[str, float]] = {}
    for name in layers:
        pairs = zip(experts, weights.for_layer(name)[0, 0, used].tolist(), strict=True)
        per_layer[name] = {expert: weight for expert, weight in pairs if weight != 0.0}
    if call.takes("statistics"):
        wanted = {expert for weighed in per_layer.values() for expert in weighed}
        _check_statistics(method, statistics or {}, wanted, pool)
    hashes = {expert: pool.adapters[expert].hash for expert in experts} if call.takes("seeds") else {}
    found = layer_updates(call, experts, hashes, per_layer, seed=seed, statistics=statistics)
    return ((layers[name], update.factors if isinstance(update, TruncatedUpdate) else update) for name, update in found)


def _check_statistics(method: str, statistics: Mapping[str, Statistics], used: set[str], pool: ExpertPool) -> None:
    for expert in sorted(used):
        if expert not in statistics:
            raise WeightingError(
                f"method {method!r} weighs by data, and there is none for expert {expert!r}: pass statistics={{name: "
                "collect_statistics(model, tokenizer, adapter, texts), ...}"
            )
        found, wanted = statistics[expert].adapter_hash, pool.adapters[expert].hash
        if found != wanted:
            raise WeightingError(
                f"the statistics given for expert {expert!r} (hash {wanted[:12]}) were collected with an adapter of "
                f"hash {found[:12]}"
            )
