"""Merging: several adapters into one, LoRA in and LoRA out, without a model."""

from __future__ import annotations

import difflib
import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraweave import registry
from loraweave.errors import LoraweaveError, WeightingError
from loraweave.hub import algebra
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

Method = Callable[[Sequence[Factors | None], Sequence[float]], Factors | None]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "linear",
    rank: int | None = None,
    name: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Adapter:
    """The adapters combined by `method`, a name of `names("methods")`, with one finite weight each, of any sign.

    Experts of weight zero are left out; the order of the rest does not matter. `rank` cuts every layer to at most that
    rank (the best approximation in the Frobenius norm). The card's "recipe" names parents, weights and method, its
    "report" gives each layer's rank before and after the cut and the relative error of the cut.

    Raises WeightingError for weights or options that do not fit, UnknownName for an unknown method, BaseModelMismatch
    and LayerMismatch for adapters that do not fit together.
    """
    used = _used(adapters, weights)
    apply = configured(method, options)
    if rank is not None and rank < 1:
        raise WeightingError(f"rank={rank} is below 1; leave it out to keep the exact rank")
    layers: dict[str, Factors] = {}
    report: dict[str, dict[str, float]] = {}
    for layer in sorted({layer for adapter, _ in used for layer in adapter.layers}):
        parts = {f"{adapter.name}#{number}": adapter.layers.get(layer) for number, (adapter, _) in enumerate(used)}
        combined = combine(apply, layer, parts, [weight for _, weight in used], seed=seed)
        if combined is None:
            continue
        layers[layer], error = (combined, 0.0) if rank is None else algebra.compress(combined, rank)
        report[layer] = {"rank_in": combined.rank, "rank_out": layers[layer].rank, "relative_error": error}
    if not layers:
        raise WeightingError(f"method {method!r} leaves no layer of {', '.join(repr(a.name) for a, _ in used)} changed")
    parents = [{"hash": adapter.hash, "name": adapter.name, "weight": weight, "method": method} for adapter, weight in used]
    recipe = {"method": method, "options": options, "seed": seed, "rank": rank, "parents": parents}
    return Adapter(
        name or "+".join(adapter.name for adapter, _ in used),
        used[0][0].base_model,
        layers,
        next((adapter.fingerprint for adapter, _ in used if adapter.fingerprint), None),
        {"recipe": recipe, "report": report},
    )


def configured(method: str, options: Mapping[str, Any]) -> Callable[..., Factors | None]:
    """The method of that name with its options set. Raises UnknownName, or WeightingError for an option it has not."""
    function = registry.get("methods", method)
    known = [parameter.name for parameter in inspect.signature(function).parameters.values()][2:]
    takes_seed = "seed" in known
    own = [option for option in known if option != "seed"]
    for option in options:
        if option not in own:
            close = difflib.get_close_matches(option, own, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise WeightingError(
                f"method {method!r} has no option {option!r}{hint}; it has {', '.join(own) if own else 'no options'}"
            )

    def apply(experts: Sequence[Factors | None], weights: Sequence[float], *, seed: int) -> Factors | None:
        extra = {"seed": seed} if takes_seed else {}
        result: Factors | None = function(experts, weights, **options, **extra)
        return result

    return apply


def combine(
    apply: Callable[..., Factors | None],
    layer: str,
    experts: Mapping[str, Factors | None],
    weights: Sequence[float],
    *,
    seed: int,
) -> Factors | None:
    """One layer's experts combined; an error of the method also names the layer and the experts."""
    # a seed of its own for each layer: equal ones would drop the same entries everywhere
    layer_seed = (seed * 0x9E3779B1 + zlib.crc32(layer.encode())) % 2**63
    try:
        return apply(list(experts.values()), weights, seed=layer_seed)
    except LoraweaveError as error:
        having = ", ".join(repr(name) for name, factors in experts.items() if factors is not None)
        raise type(error)(f"layer {layer!r} of {having}: {error}") from error


def _used(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[Adapter, float]]:
    """The adapters that count, in an order of their content."""
    if len(adapters) != len(weights):
        raise WeightingError(f"merge got {len(adapters)} adapters and {len(weights)} weights; it takes one weight for each")
    values = [float(weight) for weight in weights]
    for adapter, weight in zip(adapters, values, strict=True):
        if not math.isfinite(weight):
            raise WeightingError(f"the weight of adapter {adapter.name!r} is {weight}; weights must be finite")
    used = [(adapter, weight) for adapter, weight in zip(adapters, values, strict=True) if weight != 0.0]
    if not used:
        raise WeightingError(
            f"all {len(adapters)} weights are zero, which is the base model and no adapter; give at least one other weight"
        )
    names = [adapter.name for adapter, _ in used]
    # the pool's checks, with a name only where it is needed to tell two experts apart
    ExpertPool(
        {
            adapter.name if names.count(adapter.name) == 1 else f"{adapter.name}#{number}": adapter
            for number, (adapter, _) in enumerate(used)
        }
    )
    return sorted(used, key=lambda pair: (pair[0].hash, pair[1]))
