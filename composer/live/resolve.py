"""The mixtures that `activate` and `fused` take, as weights over a pool's experts or as routers; their limits and licenses.

Mixing distributes nothing, so licenses that exclude each other only warn; a merge that is stored refuses them.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from loraweave.common.names import near_misses, unknown_expert
from loraweave.composer.live.hook import hook_kinds
from loraweave.composer.model.layers import TargetLayer, use_of
from loraweave.errors import InvalidLicense, LayerMismatch, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.licenses import require_one_work
from loraweave.hub.pool import ExpertPool
from loraweave.routers.combined import ByRow, needs_call, parts_of, rows_of
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights, Router


def resolve(mixture: Any, pool: ExpertPool, bound: ExpertPool | None = None) -> MixtureWeights | Router:
    """Return a mixture for activate() as weights in the order of the pool's experts, or as a router.

    `bound` has the same experts with all that depends on the base resolved; a router may be for these. Weights that learn
    keep their own order, since a copy would not follow them. A list has one mixture for each row of the batch: {name:
    weight}, None, MixtureWeights of one row, or a router. Raises WeightingError for anything else and for a router of
    another pool, UnknownExpert for a name outside the pool.
    """
    match mixture:
        case MixtureWeights():
            return _align(mixture, pool)
        case Mapping():
            return _weights_by_name([mixture], pool)
        case TokenRouter():
            mixture.require_pool(bound if bound is not None and mixture.members.same_experts(bound) else pool)
            return mixture
    if callable(getattr(mixture, "weights", None)):
        return mixture  # type: ignore[no-any-return]
    if isinstance(mixture, Iterable) and not isinstance(mixture, str):
        rows = list(mixture)
        if all(row is None or isinstance(row, Mapping) for row in rows):
            return _weights_by_name(rows, pool)
        return ByRow([_resolve_row(number, row, pool, bound) for number, row in enumerate(rows)], pool.names)
    raise WeightingError(
        f"a mixture is {{name: weight}}, a list with one of these (None: the base) per row, MixtureWeights or a router, "
        f"not {mixture!r}; {{}} is the base model, and functions of (step, steps) are for a pipeline's activate()"
    )


def _weights_by_name(rows: list[Mapping[str, float] | None], pool: ExpertPool) -> MixtureWeights:
    """Return weights over only the experts that the rows name, so that the cost does not grow with the pool."""
    used = {name for row in rows if row for name in row}
    for name in used:
        if name not in pool.places:
            raise unknown_expert(name, pool.names)
    names = sorted(used, key=pool.places.__getitem__)
    if not any(isinstance(weight, Mapping) for row in rows if row for weight in row.values()):
        return MixtureWeights.of(rows, names)
    layers = pool.subset(names).layer_names
    by_layer = [[_at(layer, row) for row in rows] for layer in layers]
    _require_blocks(rows, layers)
    values = [MixtureWeights.of(of_layer, names).values_BTLE for of_layer in by_layer]
    return MixtureWeights(torch.cat(values, dim=2), tuple(names), layers)


def _by_block(weight: Any) -> Mapping[str, float]:
    """Return {start of a layer's path: weight}; a single weight is for the start "", all layers."""
    return weight if isinstance(weight, Mapping) else {"": weight}


def _at(layer: str, row: Mapping[str, Any] | None) -> dict[str, float]:
    """Return {name: weight} of one layer; if a weight is {start of a path: weight}, by the longest fitting start, else 0."""
    weights = {}
    for name, weight in (row or {}).items():
        by_block = _by_block(weight)
        blocks = [block for block in by_block if not block or f"{layer}.".startswith(f"{block}.")]
        weights[name] = by_block[max(blocks, key=len)] if blocks else 0.0
    return weights


def _require_blocks(rows: list[Mapping[str, Any] | None], layers: Iterable[str]) -> None:
    for name, block in ((n, block) for row in rows if row for n, weight in row.items() for block in _by_block(weight)):
        if not isinstance(block, str) or (block and not any(f"{layer}.".startswith(f"{block}.") for layer in layers)):
            raise WeightingError(
                f"expert {name!r} has a weight for the block {block!r}, below which none of the mixture's experts updates a "
                f"layer; a block is the beginning of a module path, such as {next(iter(layers), '')!r}"
            )


def _resolve_row(number: int, row: Any, pool: ExpertPool, bound: ExpertPool | None) -> Router | None:
    """Return row `number` of a mixture as a router over all the pool's experts; weights that learn stay over theirs."""
    if row is None:
        return None
    resolved = resolve(row, pool, bound)
    if not isinstance(resolved, MixtureWeights):
        router_experts = getattr(resolved, "experts", pool.names)
        if isinstance(resolved, ByRow) or tuple(router_experts) != pool.names:
            raise WeightingError(
                f"row {number} of the mixture is a {type(resolved).__name__} for {router_experts}, but the pool "
                f"has {pool.names}, in this order; give each row a router for this pool"
            )
        return resolved
    if resolved.values_BTLE.shape[0] != 1:
        raise ScopeError(f"row {number} of the mixture has weights for {resolved.values_BTLE.shape[0]} rows; give one row")
    if resolved.values_BTLE.requires_grad:
        return resolved
    place_E = torch.tensor([pool.places[name] for name in resolved.experts], dtype=torch.long)
    values_BTLE = resolved.values_BTLE.new_zeros(*resolved.values_BTLE.shape[:3], len(pool))
    return MixtureWeights(values_BTLE.index_copy(3, place_E, resolved.values_BTLE), pool.names, resolved.layers)


def _align(mixture: MixtureWeights, pool: ExpertPool) -> MixtureWeights:
    if len(set(mixture.experts)) != len(mixture.experts):
        raise WeightingError(f"the mixture names an expert twice: {', '.join(map(repr, mixture.experts))}")
    if len(set(mixture.layers)) != len(mixture.layers):
        raise WeightingError(f"the mixture names a layer twice: {', '.join(map(repr, mixture.layers))}")
    for name in mixture.experts:
        if name not in pool.adapters:
            raise unknown_expert(name, pool.names)
    if mixture.layers:
        # those of a lazy pool are opened to be known, so only those that the mixture names
        known = set((pool.subset(mixture.experts) if pool.lazy and mixture.experts else pool).layer_names)
        for index, layer in enumerate(mixture.layers):
            if layer not in known and bool((mixture.values_BTLE[:, :, index] != 0).any()):
                close = near_misses(layer, known)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise WeightingError(
                    f"the mixture gives weights to layer {layer!r}, which no expert of the pool updates{hint}"
                )
    if mixture.values_BTLE.requires_grad:
        # the very tensor, which an optimizer changes between calls
        return mixture
    # in the order of the pool, so that one set of experts is one set, and gives the same bits, however it was named
    places = [pool.places[name] for name in mixture.experts]
    order = sorted(range(len(places)), key=places.__getitem__)
    return MixtureWeights(mixture.values_BTLE[..., order], tuple(map(mixture.experts.__getitem__, order)), mixture.layers)


def warn_of_licenses(weights: MixtureWeights | Router, pool: ExpertPool) -> None:
    """Warn if a row mixes experts whose licenses exclude each other or forbid derived works; one expert is not a mixture."""
    licenses = pool.clashing_licenses
    if not licenses:
        return
    for names in (names for row in rows_of(weights) if row is not None for names in _names_by_row(row, pool.names)):
        try:
            if len(names) > 1:
                require_one_work((name, licenses[name]) for name in names)
        except InvalidLicense as error:
            # of one line of code, Python's default filter shows each text once
            warnings.warn(f"this mixture may be used, but not be given away as one adapter: {error}", stacklevel=1)
            return


def _names_by_row(weights: MixtureWeights | Router, names: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    """Return the experts with a weight other than 0 for each distinct row; all for a router or weights that learn."""
    if not isinstance(weights, MixtureWeights):
        return [names]
    if weights.values_BTLE.requires_grad:
        return [weights.experts]
    used_BE = (weights.values_BTLE != 0).flatten(1, 2).any(dim=1)
    distinct = dict.fromkeys(map(tuple, used_BE.tolist()))
    return [tuple(compress(weights.experts, used_E)) for used_E in distinct]


@dataclass(eq=False)
class LiveLimits:
    """The target layers that live mixing cannot serve, or not by row, with the reasons; `add` examines further layers."""

    _model: nn.Module
    # the layers that never run, and those whose first axis need not be the batch, each with the reason as a phrase
    _never_called: dict[str, str] = field(default_factory=dict)
    _out_of_order: dict[str, str] = field(default_factory=dict)
    # the layers that are experts of fused parameters
    _experts: dict[str, None] = field(default_factory=dict)

    def add(self, layers: Mapping[str, TargetLayer]) -> None:
        """Note which of these layers never run, have no batch axis first, or are experts of fused parameters."""
        of_tokens: set[int] | None = None
        for name, layer in layers.items():
            if layer.number is not None:
                self._experts[name] = None
                if not any(kind.runs_experts(layer.module) for kind in hook_kinds()):
                    self._never_called[name] = (
                        f"one of the experts of a {type(layer.module).__name__}, whose forward is its own"
                    )
                continue
            place, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(place)
            # MultiheadAttention is the owner of such a layer, in which it keeps a weight for its own product
            if isinstance(layer.module, NonDynamicallyQuantizableLinear) or use_of(owner, attribute) == "read":
                self._never_called[name] = f"which its {type(owner).__name__} never calls, computing with its weight itself"
            if re.search(r"(^|\.)experts\.(expert_)?\d+\.", name):
                self._out_of_order[name] = "sees the tokens that are routed to it, in an order of their own"
            elif isinstance(layer.module, nn.Embedding):
                of_tokens = _token_embeddings(self._model) if of_tokens is None else of_tokens
                if of_tokens is not None and id(layer.module) not in of_tokens:
                    self._out_of_order[name] = "is not an embedding of tokens, and may be called once for all rows"

    def require(self, weights: MixtureWeights | Router, adapters: Mapping[str, Adapter], *, by_token: bool = False) -> None:
        """Raise LayerMismatch or ScopeError if these weights cannot be mixed live in one of the layers.

        LayerMismatch: a layer that never runs has a weight other than 0, or a router. ScopeError: weights vary by row or
        token in a layer whose first axis need not be the batch, or a router needs more than the input of a fused parameter's
        expert. One router for all rows is allowed, since it weighs each input by itself, unless weights vary `by_token`,
        with the position in a row.
        """
        if not (self._never_called or self._experts or self._out_of_order):
            return
        rows = rows_of(weights)
        for name, why in self._never_called.items():
            for expert in _users(name, rows, adapters):
                raise LayerMismatch(
                    f"expert {expert!r} updates layer {name!r}, {why}: use fused(), which changes the weight"
                )
        routers = [row for row in rows if row is not None and not isinstance(row, MixtureWeights)]
        looks_beyond = routers and (
            len(rows) > 1 or needs_call(weights) or any(getattr(part, "watched", ()) for part in parts_of(weights))
        )
        for name in self._experts if looks_beyond or by_token else ():
            for expert in _users(name, rows, adapters):
                raise ScopeError(
                    f"expert {expert!r} updates layer {name!r}, an expert of a fused parameter, for which weights come "
                    "from its own input alone or are given: take a router that looks at no call and no block, the same "
                    "for all rows, or MixtureWeights, and no adapter with invocation tokens beside it"
                )
        # a row or token is told from its place on an axis
        varies = "row" if len(rows) > 1 else "token" if by_token else _VARIES.get(getattr(weights, "scope", ""), "")
        for name, why in self._out_of_order.items() if varies else ():
            for expert in _users(name, rows, adapters):
                raise ScopeError(
                    f"the weights vary by {varies}, but layer {name!r}, which "
                    f"expert {expert!r} updates, {why}: give one mixture for all rows, or name the other layers in "
                    "MixtureWeights(layers=...)"
                )


# the axis along which a router's weights vary, by its scope
_VARIES = {"instance": "row", "token": "token"}


def _users(layer: str, rows: Iterable[Router | None], adapters: Mapping[str, Adapter]) -> Iterable[str]:
    """Yield the experts that update the layer and may have a weight other than 0 there; a router may use all of them."""
    for row in rows:
        names: Iterable[str] = () if row is None else adapters
        if isinstance(row, MixtureWeights):
            names = compress(row.experts, (row.for_layer(layer) != 0).flatten(0, 1).any(dim=0).tolist())
        yield from (name for name in names if layer in adapters[name].layers)


def _token_embeddings(model: nn.Module) -> set[int] | None:
    """Return the ids of the modules that a transformers model calls its input embeddings; None for another kind of model."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    embedding_ids = set()
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            try:
                embedding_ids.add(id(module.get_input_embeddings()))  # type: ignore[operator]
            # a part of a model without tokens
            except (NotImplementedError, AttributeError):
                continue
    return embedding_ids
