"""The types that a merge method takes and returns for one layer, and `MethodCall`: a method with its options set.

The numbers given to a merge are checked here, before a method gets them.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import loraweave.registry as registry
from loraweave.common.options import check_options, options_of
from loraweave.errors import AdapterUnsupported, CompositionError, LayerMismatch, LoraweaveError, UnknownName, WeightingError
from loraweave.lowrank.algebra import all_finite, signature, weighted_sum
from loraweave.types import Factors, Kind

# one layer's update of each expert, None for an expert without the layer; a method gets at least one of weight other than 0
Experts = Sequence[Factors | None]
Weights = Sequence[float]


@dataclass(frozen=True, eq=False)
class Term:
    """One expert that has the layer: its factors, its weight (not zero), and its place in the method's `experts`."""

    factors: Factors
    weight: float
    place: int


def terms(experts: Experts, weights: Weights) -> list[Term]:
    """Return the experts that have the layer and a weight other than zero, in the order given; all of one shape and kind.

    Raises AdapterUnsupported for an update that depends on the base layer: one with a gain, DoRA's magnitude or a trained
    base bias. Raises LayerMismatch, with both shapes, for updates that differ.
    """
    terms_E: list[Term] = []
    for place, (factors, weight) in enumerate(zip(experts, weights, strict=True)):
        if factors is None or weight == 0.0:
            continue
        if not factors.bound or factors.gain_O is not None:
            raise AdapterUnsupported(
                "the method works on the update as a matrix, and DoRA's magnitude, a gain or a trained base bias needs the "
                "base layer: turn the adapter into a plain LoRA with the model first (lw.to_lora), or use linear"
            )
        if terms_E and signature(factors) != signature(terms_E[0].factors):
            raise LayerMismatch(
                f"the method cannot combine updates of (O, I, kind, kernel) {signature(terms_E[0].factors)} and "
                f"{signature(factors)}"
            )
        terms_E.append(Term(factors, float(weight), place))
    return terms_E


def terms_of_one_rank(experts: Experts, weights: Weights, *, twin: str) -> list[Term]:
    """Return `terms(experts, weights)` for a method that needs all experts to have one rank in the layer.

    Raises LayerMismatch for different ranks; its message recommends `twin`, the method that works on whole updates instead.
    """
    terms_E = terms(experts, weights)
    for term in terms_E:
        if term.factors.rank != terms_E[0].factors.rank:
            raise LayerMismatch(
                f"the method mixes a and b apart and needs equal ranks, but found {terms_E[0].factors.rank} and "
                f"{term.factors.rank}: use {twin}, which works on the updates and takes any ranks"
            )
    return terms_E


def weighted_bias(found: Sequence[Term]) -> Tensor | None:
    """Return the sum of w_e bias_e over the terms with a bias, fp32; None if no term has a bias."""
    return weighted_sum([term.factors.bias_O for term in found], [term.weight for term in found])


@dataclass(frozen=True, eq=False)
class DenseUpdate:
    """One layer's merged update as a matrix: x -> x delta^T + bias, fp32. `merge` turns it into factors."""

    delta_OI: Tensor
    bias_O: Tensor | None = None
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class TruncatedUpdate:
    """One layer's factors, the rank of the update before it was cut to them, and the relative Frobenius error of the cut.

    `inner_EE` has <w_i D_i, w_j D_j> of the experts that have the layer, if the method computed it.
    """

    factors: Factors
    rank_in: int
    relative_error: float
    inner_EE: NDArray[np.float64] | None = None


def without_figures(update: Factors | DenseUpdate | TruncatedUpdate) -> Factors | DenseUpdate:
    """Return the factors of a `TruncatedUpdate`; any other update is returned unchanged."""
    return update.factors if isinstance(update, TruncatedUpdate) else update


Update = Factors | DenseUpdate | TruncatedUpdate
# (experts, weights, *, options) -> the update of one layer, as the files of `methods` are
Method = Callable[..., Update | None]
_Method = TypeVar("_Method", bound=Method)

# parameters that the merge fills in for a method, which are not options of the user
SUPPLIED = tuple(registry.RESERVED["methods"])


@runtime_checkable
class AdapterStatistics(Protocol):
    """The statistics recorded of one adapter, by layer, for methods that take `statistics`."""

    @property
    def layers(self) -> Mapping[str, Any]:
        """Return {layer: the statistics of this adapter in that layer}, each handed to the method as it is."""

    def require_of(self, name: str, content_hash: str) -> None:
        """Raise WeightingError unless the statistics were recorded of the adapter with that name and hash."""


def surveys(survey: Callable[..., Any], *, where: Callable[..., bool] | None = None) -> Callable[[_Method], _Method]:
    """Declare that a method needs a survey of all layers before it combines the first; it gets the result as `survey`.

    `survey(layers, weights, **options)` is called with the experts' factors of every layer and with those of the method's
    options that are its parameters. `where(**options)` returns True if the method needs the result; by default it always
    does.
    """

    def declared(method: _Method) -> _Method:
        method.survey, method.needs_survey = survey, where  # type: ignore[attr-defined]
        return method

    return declared


class MethodCall:
    """A merge method, given by name or as a function, with its options.

    Raises UnknownName for an unknown name, WeightingError for an option that the method does not have, for an option's value
    outside the range in the method's signature, and for a function whose first parameters are not experts and weights.
    """

    def __init__(self, given: str | Method, options: Mapping[str, Any] | None = None) -> None:
        if not isinstance(given, str) and not inspect.isfunction(given):
            raise UnknownName(
                f"a method is given by its name or as a function, not as {given!r:.80}; names('methods') has the names"
            )
        self.given = given
        self.function: Any = registry.get("methods", given) if isinstance(given, str) else given
        # the registered name, or the name of the function
        self.method = str(getattr(given, "__name__", given))
        self.options = {} if options is None else options
        # some are no options of the user, those of `SUPPLIED`, which merging passes
        self.parameters = inspect.signature(self.function).parameters
        second = next(islice(self.parameters.values(), 1, None), None)
        if second is None or second.kind > second.POSITIONAL_OR_KEYWORD:
            raise WeightingError(
                f"method {self.method!r} takes ({', '.join(self.parameters)}); a method takes experts and weights first, "
                "and its options by name"
            )
        if not isinstance(self.options, Mapping):
            raise WeightingError(
                f"the options of method {self.method!r} are {self.options!r:.80}, and not a mapping of names to values; "
                "leave them out for none"
            )
        if self.options:
            check_options(f"method {self.method!r}", self.options, self._kinds)

    @property
    def own_options(self) -> list[str]:
        """The names of the options that a user may set."""
        return list(self._kinds)

    @cached_property
    def survey(self) -> Callable[..., Any] | None:
        """The function (layers, weights) -> survey of a method that surveys all layers before the first; else None."""
        if "survey" not in self.parameters:
            return None
        if not hasattr(self.function, "survey"):
            raise WeightingError(
                f"method {self.method!r} takes a survey, and nothing says how to make it: declare it by `surveys`"
            )
        where, survey = self.function.needs_survey, self.function.survey
        if where is not None and not where(**self._options_of(where)):
            return None
        return partial(survey, **self._options_of(survey))

    def combine(
        self, layer: str, experts: Mapping[str, Factors | None], weights: Sequence[float], **supplied: Any
    ) -> Update | None:
        """Return one layer's merged update, finite in fp32; None where no expert has the layer and a weight other than 0.

        `supplied` has values for parameters of `SUPPLIED`; those that the method does not have are dropped. An error of the
        method also names the method, the layer and the experts. Raises CompositionError for experts and results that are not
        finite, and for weights that take an update beyond fp32.
        """
        if not require_sound(layer, experts, weights, self.method):
            return None
        for name in set(supplied) - self.parameters.keys():
            del supplied[name]
        try:
            result = self.function(list(experts.values()), weights, **self.options, **supplied)
        except LoraweaveError as error:
            having = _listed(experts)
            raise type(error)(f"method {self.method!r}, layer {layer!r} of {having}: {error}") from error
        if not isinstance(result, Update | None):
            raise CompositionError(
                f"method {self.method!r} gave a {type(result).__name__} for layer {layer!r}; a method gives Factors, a "
                "DenseUpdate or a TruncatedUpdate, or None for a layer that it leaves alone"
            )
        if result is not None and not holds(result):
            raise CompositionError(
                f"method {self.method!r} gave values that are NaN or infinite for layer {layer!r} of {_listed(experts)}; "
                f"the weights {', '.join(f'{weight:g}' for weight in weights)} take the sum beyond what fp32 holds: use "
                "smaller ones"
            )
        return result

    def _options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the method's options that are also parameters of `function`."""
        if not self.options:
            return {}
        known = options_of(function)
        return {name: value for name, value in self.options.items() if name in known}

    @cached_property
    def _kinds(self) -> Mapping[str, Any]:
        """The kind of every option that a user may set, by the option's name."""
        return options_of(self.function, after=2, beside=SUPPLIED)


def _listed(experts: Mapping[str, Factors | None]) -> str:
    return ", ".join(repr(name) for name, factors in experts.items() if factors is not None)


def layer_seeds(seed: int, hashes: Sequence[str], layer: str) -> list[int]:
    """Return a seed of 63 bits for each expert in this layer, derived from its content hash, not its place or name."""
    texts = (f"{seed}/{content}/{layer}" for content in hashes)
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1 for text in texts]


# the largest entry of a weighted update: 256 such entries still sum to 2^128, the limit of fp32
LARGEST = 2.0**120

# entries of an update that are formed at once, in float64
BLOCK = 2**20


def finite_weights(weights: Any, names: Sequence[str]) -> list[float]:
    """Return one finite number for each of the named adapters. Raises WeightingError for anything else."""
    # a set has no order, and would lose equal weights
    unordered = isinstance(weights, str | bytes | Mapping | Set) or not hasattr(weights, "__len__")
    if unordered or getattr(weights, "ndim", 1) != 1:
        raise WeightingError(
            f"weights={weights!r:.80} is not a list of numbers; give one for each of {len(names)} adapters, in their order"
        )
    if len(weights) != len(names):
        raise WeightingError(f"merge got {len(names)} adapters and {len(weights)} weights; it takes one weight for each")
    values = []
    for name, weight in zip(names, weights, strict=True):
        try:
            value = math.nan if isinstance(weight, str | bytes) else float(weight)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            value = math.nan
        if not math.isfinite(value):
            raise WeightingError(f"the weight of adapter {name!r} is {weight!r:.80}; weights must be finite numbers")
        values.append(value)
    return values


def require_seed(seed: object) -> None:
    """Raise WeightingError for a seed that is not a whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise WeightingError(
            f"seed={seed!r:.80} is not a whole number; give one, such as 0, and the same one for the same result"
        )


def require_sound(layer: str, experts: Mapping[str, Factors | None], weights: Sequence[float], method: str) -> bool:
    """Return True if any expert has the layer and a weight other than 0.

    Raises CompositionError for an expert's values that are NaN or infinite, or that its weight takes beyond 2^120. Each
    factor is read once, for its norm; the update itself is computed only where the product of norms is beyond 2^120.
    """
    counts = False
    for (name, factors), weight in zip(experts.items(), weights, strict=True):
        if factors is None or weight == 0.0:
            continue
        counts = True
        limit = LARGEST / abs(weight)
        part, largest = _extent(factors, limit)
        if part is not None:
            tensor = factors.tensors()[part]
            num = int((~torch.isfinite(tensor)).sum())
            raise CompositionError(
                f"{num} of {tensor.numel()} values in {part} of adapter {name!r} are NaN or infinite in layer "
                f"{layer!r}; leave the adapter out, or read it again"
            )
        if largest > limit:
            raise CompositionError(
                f"method {method!r} could give values that are NaN or infinite for layer {layer!r}: the update of "
                f"{name!r} is up to {largest:.3g}, its weight is {weight:.3g}, and the product may be {LARGEST:.3g} at "
                "most; use a smaller weight"
            )
    return counts


def holds(update: Factors | DenseUpdate | TruncatedUpdate) -> bool:
    """Return True if a result is finite: its tensors, and the product of its factors in fp32."""
    if isinstance(update, DenseUpdate):
        return all_finite(update.delta_OI) and (update.bias_O is None or all_finite(update.bias_O))
    limit = torch.finfo(torch.float32).max
    part, largest = _extent(update if isinstance(update, Factors) else update.factors, limit)
    return part is None and largest <= limit


def _extent(factors: Factors, enough: float) -> tuple[str | None, float]:
    """Return (first tensor with a NaN or infinity or None, largest magnitude of the update and its bias).

    The magnitude is an upper bound where that is at most `enough`: no entry of the update exceeds |B| |A|.
    """
    a_RI, b_OR = factors.a_RI.detach(), factors.b_OR.detach()
    bound = float(torch.linalg.vector_norm(b_OR)) * float(torch.linalg.vector_norm(a_RI))
    # then both are finite
    sound = ("a_RI", "b_OR") if math.isfinite(bound) else ()
    for part, tensor in factors.tensors().items():
        if part not in sound and not all_finite(tensor):
            return part, math.inf
    bias = 0.0 if factors.bias_O is None else float(factors.bias_O.detach().abs().max())
    if max(bound, bias) <= enough or not factors.rank:
        return None, max(bound, bias)
    step = max(1, BLOCK // a_RI.shape[1])
    a_RI, b_OR = a_RI.double(), b_OR.double()
    return None, max(bias, *(float((b_OR[row : row + step] @ a_RI).abs().max()) for row in range(0, len(b_OR), step)))
