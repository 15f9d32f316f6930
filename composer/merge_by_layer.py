"""One adapter out of a task-scope mixture, also of one whose layers have weights of their own."""

from __future__ import annotations

from collections.abc import Mapping

from loraweave.composer.merge import cut, layer_updates, merge, parent_of
from loraweave.composer.method_call import MethodCall
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.kept_files import shared
from loraweave.hub.license_terms import license_of_work
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights


def merge_mixture(
    pool: ExpertPool, mixture: MixtureWeights, *, method: str = "linear", name: str, allow_licenses: bool = False
) -> Adapter:
    """The adapter that `method` makes of the pool's experts and a mixture of task scope."""
    if mixture.layers:
        return merge_by_layer(pool, mixture.by_layer(), method=method, name=name, allow_licenses=allow_licenses)
    weights = {expert: weight for expert, weight in mixture.as_dict().items() if weight}
    return merge(
        [pool[expert] for expert in weights],
        list(weights.values()),
        method=method,
        name=name,
        progress=False,
        allow_licenses=allow_licenses,
    )


def merge_by_layer(
    pool: ExpertPool,
    weights: Mapping[str, Mapping[str, float]],
    *,
    method: str = "linear",
    name: str,
    allow_licenses: bool = False,
) -> Adapter:
    """The adapter that `method` makes of {layer: {expert: weight}}; experts of weight 0 in a layer are left out of it.

    Raises WeightingError where nothing is left, InvalidLicense for licenses that exclude each other unless `allow_licenses`,
    and what the method raises.
    """
    used = {layer: {e: w for e, w in of_layer.items() if w} for layer, of_layer in weights.items()}
    names = [expert for expert in pool.names if any(expert in of_layer for of_layer in used.values())]
    if not names:
        raise WeightingError("all weights are zero, which is the base model and no adapter; give at least one other weight")
    experts = {expert: pool[expert] for expert in names}
    license = license_of_work([(e, adapter.card) for e, adapter in experts.items()], allowed=allow_licenses)
    updates = layer_updates(
        MethodCall(method, {}),
        {expert: adapter.layers for expert, adapter in experts.items()},
        {expert: adapter.hash for expert, adapter in experts.items()},
        used,
        seed=0,
    )
    layers = {layer: cut(update, None)[1] for layer, update in updates}
    parents = [{**parent_of(adapter), "name": expert, "method": method} for expert, adapter in experts.items()]
    recipe = {"method": method, "options": {}, "seed": 0, "rank": None, "parents": parents, "weights_by_layer": used}
    first = next(iter(experts.values()))
    known = next((adapter.fingerprint for adapter in experts.values() if adapter.fingerprint), None)
    card = {"recipe": recipe, **({} if license is None else {"license": license})}
    files = shared([adapter.files for adapter in experts.values()])
    return Adapter(name, first.base_model, layers, known, card, files=files)
