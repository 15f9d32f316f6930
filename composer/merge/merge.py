"""The merging of several adapters into one, LoRA in and LoRA out, without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loraweave.common.checks import is_list
from loraweave.common.display import tracked
from loraweave.common.process import side_by_side
from loraweave.composer.merge.method_call import (
    AdapterStatistics,
    Method,
    MethodCall,
    TruncatedUpdate,
    Update,
    finite_weights,
    layer_seeds,
    require_seed,
    require_sound,
)
from loraweave.composer.merge.methods._entries import ALONE
from loraweave.errors import BaseModelMismatch, CompositionError, LayerMismatch, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter, parent_of, shared_invocation
from loraweave.hub.formats._files import shared_files
from loraweave.hub.licenses import license_of_work
from loraweave.hub.merge_report import LayerReport, MergeReport
from loraweave.hub.merge_report import interference as compare
from loraweave.lowrank import algebra
from loraweave.lowrank.factorise import factorise
from loraweave.types import Factors

if TYPE_CHECKING:
    from loraweave.hub.pool import ExpertPool

# a thread is worth starting only for a cut of more multiplications than this
SMALL = 1e7
# a layer, its experts' factors, and the call that returns its merged update
LayerCall = tuple[str, Sequence[Factors | None], Callable[[], Update | None]]
# an adapter of weight other than 0, its weight, and the statistics of its inputs
Parent = tuple[Adapter, float, AdapterStatistics | None]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str | Method = "linear",
    rank: int | None = None,
    name: str | None = None,
    seed: int = 0,
    heads: str = "error",
    statistics: Sequence[AdapterStatistics] | None = None,
    progress: bool = True,
    allow_licenses: bool = False,
    interference: bool = True,
    **options: Any,
) -> Adapter:
    """Return the adapters combined by `method`, a method's name or a function, with one finite weight each, of any sign.

    A function has the signature of a method of `names("methods")`. Without weights all have equal shares, which sum to 1.
    Experts of weight zero are left out; the order of the rest does not matter. `rank` cuts every layer to at most that rank
    (the best approximation in the Frobenius norm); without it the update is exact, unless the method is limited in rank
    itself. `seed` is that of random methods, which draw for each adapter and layer apart. `heads` says what becomes of
    trained heads: "error", "first" (the first adapter's, in the order given) or "average". `statistics`, one for each
    adapter from `collect_statistics`, is for methods that weigh by data. The other `options` are the method's own.

    The result's `report` has each layer's rank before and after the cut, the relative error of the cut, and how far the
    adapters' updates agree (unless `interference` is False, which saves about a fifth of the time of a linear merge). The
    card's "recipe" names parents, weights and method, and its "license" joins those of all parents. Parents whose licenses
    are known to exclude each other, or derived works, need `allow_licenses`.

    Raises WeightingError for weights, rank, seed or options that do not fit, UnknownName for an unknown method,
    BaseModelMismatch and LayerMismatch for adapters that do not fit together, InvalidLicense for licenses that do not,
    CompositionError for heads that need a choice and for adapters and results that are not finite. Nothing is left behind
    by an error.
    """
    parents = _parents(adapters, weights, statistics)
    call = MethodCall(method, options)
    method = call.method
    if "statistics" in call.parameters and statistics is None:
        raise WeightingError(
            f"method {method!r} weighs by data: pass statistics=[collect_statistics(model, tokenizer, adapter, texts), ...] "
            "with one for each adapter"
        )
    used, numbers, recorded = zip(*parents, strict=True)
    if rank is not None:
        _check_rank(rank, used)
    require_seed(seed)
    copied = len(used) == 1 and numbers[0] == 1.0 and call.given == "linear" and rank is None
    cards = [(adapter.name, adapter.card) for adapter in used]
    licensed = any("license" in card for _, card in cards)
    license = license_of_work(cards, allowed=allow_licenses or copied) if licensed else None
    kept_heads = merge_heads(list(zip(used, numbers, strict=True)), heads)
    parents.sort(key=lambda parent: (parent[0].hash, parent[1]))
    used, numbers, recorded = zip(*parents, strict=True)
    names = [adapter.name for adapter in used]
    layers, report = _merge_layers(call, names, used, numbers, recorded, rank, seed, progress, interference)
    lineage = [{**parent_of(adapter), "weight": w, "method": method} for adapter, w in zip(used, numbers, strict=True)]
    if not layers:
        raise WeightingError(f"method {method!r} leaves no layer of {', '.join(map(repr, names))} changed")
    recipe = {"method": method, "options": options, "seed": seed, "rank": rank, "parents": lineage}
    if kept_heads:
        recipe["heads"] = heads
    card = {"recipe": recipe, "report": MergeReport(layers=report).to_json()}
    return _child(name or "+".join(names), used, layers, card, license, kept_heads)


def _child(
    name: str,
    parents: Sequence[Adapter],
    layers: Mapping[str, Factors],
    card: Mapping[str, Any],
    license: str | None,
    heads: Mapping[str, Tensor],
) -> Adapter:
    """Return the merged adapter, with the base model, fingerprint and files of its parents."""
    card = dict(card) if license is None else {**card, "license": license}
    known = next((parent.fingerprint for parent in parents if parent.fingerprint), None)
    files = shared_files([parent.files for parent in parents]) if parents[0].files else {}
    return Adapter(name, parents[0].base_model, layers, known, card, heads, files, parents[0].invocation)


def layer_updates(calls: Iterable[LayerCall]) -> Iterator[tuple[str, Update]]:
    """Return an iterator over (layer, update) of every layer that changes, calculated one at a time."""
    return ((layer, update) for layer, _, combine in calls if (update := combine()) is not None)


def layer_calls(
    call: MethodCall,
    experts: Mapping[str, Mapping[str, Factors]],
    hashes: Mapping[str, str],
    weights: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    statistics: Mapping[str, AdapterStatistics | None] | None = None,
    rank: int | None = None,
) -> Iterator[LayerCall]:
    """Yield (layer, experts' factors, the call that merges them) for each layer of `weights` that an expert updates.

    `weights` is {layer: {expert: weight}}; `rank` is for methods whose formula limits the rank (None: their default). Raises
    WeightingError for a method that surveys all layers first, if the layers' weights differ.
    """
    by_layer = {layer: {name: experts[name].get(layer) for name in of_layer} for layer, of_layer in weights.items()}
    survey = None
    if call.survey is not None:
        shared = next(iter(weights.values()), {})
        for layer, of_layer in weights.items():
            if of_layer != shared:
                raise WeightingError(
                    f"method {call.method!r} looks at all layers together and takes one weight per adapter for all of them"
                )
            require_sound(layer, by_layer[layer], list(shared.values()), call.method)
        survey = call.survey([list(updates.values()) for updates in by_layer.values()], list(map(float, shared.values())))
    for layer, updates in by_layer.items():
        of_layer = weights[layer]
        if not any(updates.values()):
            continue
        supplied: dict[str, Any] = {"survey": survey, "rank": rank}
        if "seeds" in call.parameters:
            supplied["seeds"] = layer_seeds(seed, [hashes[name] for name in of_layer], layer)
        if "statistics" in call.parameters:
            known = [(statistics or {}).get(name) for name in of_layer]
            supplied["statistics"] = [None if seen is None else seen.layers.get(layer) for seen in known]
        combine = partial(call.combine, layer, updates, list(of_layer.values()), **supplied)
        yield layer, list(updates.values()), combine


def _merge_layers(
    call: MethodCall,
    names: list[str],
    used: Sequence[Adapter],
    numbers: Sequence[float],
    recorded: Sequence[AdapterStatistics | None],
    rank: int | None,
    seed: int,
    progress: bool,
    interference: bool,
) -> tuple[dict[str, Factors], dict[str, LayerReport]]:
    """Return the merged factors and the report of each layer that changes."""
    if len(set(names)) < len(names):
        names = [name if names.count(name) == 1 else f"{name}#{place}" for place, name in enumerate(names)]
    experts = {name: adapter.layers for name, adapter in zip(names, used, strict=True)}
    layer_names = sorted(set().union(*experts.values()))
    weights = dict(zip(names, numbers, strict=True))
    calls = layer_calls(
        call,
        experts,
        {name: adapter.hash for name, adapter in zip(names, used, strict=True)} if "seeds" in call.parameters else {},
        dict.fromkeys(layer_names, weights),
        seed=seed,
        statistics=dict(zip(names, recorded, strict=True)),
        rank=rank,
    )

    def done(item: LayerCall) -> tuple[str, Factors, LayerReport] | None:
        layer, updates, combine = item
        update = combine()
        if update is None:
            return None
        truncated = cut(update, rank)
        factors = truncated.factors
        if not factors.rank and factors.bound and factors.gain_O is None and factors.bias_O is None:
            return None
        ranks, error = (truncated.rank_in, factors.rank), truncated.relative_error
        if not interference:
            return layer, factors, LayerReport(*ranks, error)
        return layer, factors, compare(updates, numbers, truncated.inner_EE, ranks=ranks, relative_error=error)

    layers, report = {}, {}
    merged = side_by_side(done, calls, worth=lambda item: worth_a_thread(item[1]))
    if progress and sys.stderr.isatty():
        merged = tracked(merged, f"merging by {call.method}", total=len(layer_names))
    for result in merged:
        if result is not None:
            layer, layers[layer], report[layer] = result
    return layers, report


def worth_a_thread(experts: Sequence[Factors | None]) -> bool:
    """Return True if merging a layer in a thread pays: its cut takes far longer than starting one, and it is small."""
    updates = [factors for factors in experts if factors is not None]
    num_out, num_in = updates[0].b_OR.shape[0], updates[0].a_RI.shape[1]
    return num_out * num_in <= ALONE and sum(update.rank for update in updates) ** 2 * (num_out + num_in) > SMALL


def cut(update: Update, rank: int | None) -> TruncatedUpdate:
    """Return the update as factors of at most `rank`; a `TruncatedUpdate`, cut by its method, is returned unchanged."""
    match update:
        case TruncatedUpdate():
            return update
        case Factors():
            factors, error = (update, 0.0) if rank is None else algebra.compress(update, rank)
            return TruncatedUpdate(factors, update.rank, error)
    a_RI, b_OR, error = factorise(update.delta_OI, rank=rank)
    factors = Factors(a_RI, b_OR, bias_O=update.bias_O, kind=update.kind, kernel=update.kernel)
    return TruncatedUpdate(factors, min(update.delta_OI.shape), error)


def _parents(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, statistics: Sequence[AdapterStatistics] | None
) -> list[Parent]:
    """Return the adapters of weight other than 0, in the order given. Raises every error that the arguments can cause."""
    listed = isinstance(adapters, Collection) and not isinstance(adapters, Mapping | str | bytes)
    strange = [item for item in adapters if not isinstance(item, Adapter)] if listed else [adapters]
    if strange:
        shown = repr(strange[0]) if isinstance(strange[0], str | int | float | None) else type(strange[0]).__name__
        raise WeightingError(
            f"merge takes a list of adapters, not {shown:.80}: of a pool pass list(pool.adapters.values()), of a "
            "mapping its values, of a hub hub[name], of an expert model its adapter(), adapter(task) or expert(number)"
        )
    if not adapters:
        raise WeightingError("merge got no adapters; give at least one, and a weight for each")
    if weights is None:
        weights = [1 / len(adapters)] * len(adapters)
    if callable(getattr(weights, "weights", None)):
        raise ScopeError(
            f"cannot merge by {type(weights).__name__}: merge takes one number for each adapter. activate() it instead; "
            "what a router gives depends on the input, and no one adapter has it"
        )
    values = finite_weights(weights, [adapter.name for adapter in adapters])
    if statistics is not None:
        _check_statistics(statistics, len(adapters))
    recorded = statistics if statistics is not None else [None] * len(adapters)
    used = [parent for parent in zip(adapters, values, recorded, strict=True) if parent[1] != 0.0]
    if not used:
        raise WeightingError(
            f"all {len(adapters)} weights are zero, which is the base model and no adapter; give at least one other weight"
        )
    _check_together([parent[0] for parent in used])
    for adapter, _, seen in used:
        if seen is not None:
            seen.require_of(adapter.name, adapter.hash)
    return used


def _check_statistics(given: Any, num_adapters: int) -> None:
    if not is_list(given, AdapterStatistics):
        raise WeightingError(
            f"statistics={given!r:.80} is not a list of Statistics; collect_statistics(model, tokenizer, adapter, texts) "
            "makes one for each adapter"
        )
    if len(given) != num_adapters:
        raise WeightingError(f"merge got {num_adapters} adapters and {len(given)} statistics; it takes one for each")


def _check_together(used: Sequence[Adapter]) -> None:
    """Raise an error unless the adapters have one base and one shape for each layer, and names that tell them apart."""
    by_name: dict[str, Adapter] = {}
    first, alike = used[0], True
    for adapter in used:
        other = by_name.setdefault(adapter.name, adapter)
        if other is not adapter and other.hash != adapter.hash:
            raise WeightingError(
                f"two different adapters are named {adapter.name!r} (hashes {other.hash[:12]} and "
                f"{adapter.hash[:12]}); rename one with dataclasses.replace(adapter, name=...)"
            )
        same_base = adapter.base_model == first.base_model and adapter.fingerprint == first.fingerprint
        same_base &= adapter.card.get("peft") == first.card.get("peft")
        alike &= same_base and adapter.form is first.form and adapter.invocation == first.invocation
    if alike:
        return
    # most merges need no pool
    from loraweave.hub.pool import require_one_base

    require_one_base(by_name)
    shared_invocation(used)
    for adapter in used[1:]:
        known = adapter.fingerprint and first.fingerprint
        if not known and first.base_model and adapter.base_model and first.base_model != adapter.base_model:
            raise BaseModelMismatch(
                f"adapters {first.name!r} (for {first.base_model!r}) and {adapter.name!r} (for {adapter.base_model!r}) name "
                "different base models; if both are one model, say so with dataclasses.replace(adapter, base_model=...)"
            )


def _check_rank(rank: int, used: Sequence[Adapter]) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise WeightingError(f"rank={rank!r:.80} is not a whole number of 1 or more; leave it out to keep the exact rank")
    sides: dict[str, int] = {}
    for adapter in used:
        for layer, factors in adapter.layers.items():
            sides[layer] = min(factors.b_OR.shape[0], factors.a_RI.shape[1])
    layer = max(sides, key=sides.__getitem__)
    if rank > sides[layer]:
        raise WeightingError(
            f"rank={rank} is above {sides[layer]}, the smaller side of the largest layer ({layer!r}): no update has more; "
            "leave it out to keep the exact rank"
        )


def merge_by_layer(
    pool: ExpertPool,
    weights: Mapping[str, Mapping[str, float]],
    *,
    method: str = "linear",
    name: str,
    allow_licenses: bool = False,
) -> Adapter:
    """Return the merge by `method` for weights {layer: {expert: weight}}; experts of weight 0 are left out of a layer.

    Raises WeightingError if all weights are zero, InvalidLicense for licenses that exclude each other unless
    `allow_licenses`, and the errors of the method.
    """
    used = {layer: {e: w for e, w in of_layer.items() if w} for layer, of_layer in weights.items()}
    names = [expert for expert in pool.names if any(expert in of_layer for of_layer in used.values())]
    if not names:
        raise WeightingError("all weights are zero, which is the base model and no adapter; give at least one other weight")
    experts = {expert: pool[expert] for expert in names}
    shared_invocation(list(experts.values()))
    license = license_of_work([(e, adapter.card) for e, adapter in experts.items()], allowed=allow_licenses)
    parts = {expert: adapter.layers for expert, adapter in experts.items()}
    hashes = {expert: adapter.hash for expert, adapter in experts.items()}
    updates = layer_updates(layer_calls(MethodCall(method), parts, hashes, used, seed=0))
    layers = {layer: cut(update, None).factors for layer, update in updates}
    parents = [{**parent_of(adapter), "name": expert, "method": method} for expert, adapter in experts.items()]
    recipe = {"method": method, "options": {}, "seed": 0, "rank": None, "parents": parents, "weights_by_layer": used}
    return _child(name, list(experts.values()), layers, {"recipe": recipe}, license, {})


CHOICES = ("error", "first", "average")


def merge_heads(used: Sequence[tuple[Adapter, float]], choice: str) -> dict[str, Tensor]:
    """Return the heads of a merge of these (adapter, weight) pairs, in the order that the user gave.

    One adapter of weight 1 keeps its heads. Otherwise "first" takes each head from the first adapter that has it, "average"
    the sum of w_e h_e over the sum of w_e, over the adapters that have it, and "error" refuses. Raises WeightingError for
    another choice or weights that sum to zero, CompositionError for heads under "error", LayerMismatch for an average of
    heads of different shape.
    """
    if choice not in CHOICES:
        raise WeightingError(f"heads={choice!r} is not one of {', '.join(map(repr, CHOICES))}")
    having: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in used:
        for head in adapter.heads:
            having.setdefault(head, []).append((adapter, weight))
    if len(used) == 1 and used[0][1] == 1.0:
        return dict(used[0][0].heads)
    if not having:
        return {}
    if choice == "error":
        listed = "; ".join(f"{head!r} in {', '.join(repr(a.name) for a, _ in owners)}" for head, owners in having.items())
        raise CompositionError(
            f"trained heads replace the base's weights and do not add up: {listed}. Choose heads='first' (the first "
            "adapter's) or heads='average' (their weighted mean)"
        )
    if choice == "first":
        return {head: owners[0][0].heads[head] for head, owners in having.items()}
    return {head: _mean(head, owners) for head, owners in having.items()}


def _mean(head: str, owners: Sequence[tuple[Adapter, float]]) -> Tensor:
    first = owners[0][0]
    for adapter, _ in owners:
        if adapter.heads[head].shape != first.heads[head].shape:
            raise LayerMismatch(
                f"head {head!r} has shape {tuple(first.heads[head].shape)} in {first.name!r} and "
                f"{tuple(adapter.heads[head].shape)} in {adapter.name!r}, so there is no average; use heads='first'"
            )
    total = sum(weight for _, weight in owners)
    if total == 0.0:
        raise WeightingError(f"the weights of the adapters with head {head!r} sum to 0, so there is no average")
    summed = sum(adapter.heads[head].double() * weight for adapter, weight in owners)
    return (summed / total).float()  # type: ignore[union-attr]
