"""A merge method, chosen by name, as a step of another method, which passes it the experts in other coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from loraweave import Factors, WeightingError
from loraweave.extend import get, traits_of
from loraweave.extend.merging import DenseUpdate, Experts, MethodCall, Weights

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def inner_call(name: str, options: Mapping[str, Any], *, method: str) -> MethodCall:
    """Return the merge method `name` with its options, for use inside `method`.

    Raises UnknownName for a name that no method has, WeightingError for one that `method` cannot use.
    """
    if name == method:
        raise WeightingError(
            f"{method}: inner={name!r} is the method itself; name the rule that it should apply, such as 'ties_per_layer'"
        )
    # core_space goes by factors, too, but by those of the space that it finds itself
    if name != "core_space" and "by_factors" in traits_of(get("methods", name)):
        raise WeightingError(
            f"{method}: inner={name!r} mixes the factors a and b, whose coordinates {method} changes; name a rule on "
            "updates, like 'ties_per_layer' or 'linear'"
        )
    call = MethodCall(name, options)
    if "statistics" in call.parameters:
        raise WeightingError(
            f"{method}: inner={name!r} needs statistics of the layer's own inputs and outputs; merge with {name!r} directly"
        )
    return call


def combined(
    call: MethodCall, experts: Experts, weights: Weights, seeds: Sequence[int], *, survey: Any = None
) -> Factors | DenseUpdate | None:
    """Return the inner method's merge of one layer's experts; None if nothing of them is left.

    `seeds` has one per expert; `survey` is the inner method's survey of all layers (None: it treats this layer as all of
    them). Raises WeightingError if it needs seeds and has none.
    """
    extra: dict[str, Any] = {"survey": survey} if survey is not None else {}
    if "seeds" in call.parameters:
        if len(seeds) != len(experts):
            raise WeightingError(
                f"inner={call.method!r} is random and needs a seed for each of {len(experts)} experts, got {len(seeds)}"
            )
        extra["seeds"] = seeds
    result: Factors | DenseUpdate | None = call.function(experts, weights, **call.options, **extra)
    return result


def with_biases(experts: Experts, originals: Sequence[Factors | None]) -> list[Factors | None]:
    """Return the experts with the originals' biases (zeros for missing ones), for the inner rule to merge unchanged."""
    known = [original.bias_O for original in originals if original is not None and original.bias_O is not None]
    if not known:
        return list(experts)
    return [
        None
        if expert is None or original is None
        else replace(expert, bias_O=torch.zeros_like(known[0]) if original.bias_O is None else original.bias_O.clone())
        for expert, original in zip(experts, originals, strict=True)
    ]
