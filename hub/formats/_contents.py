"""The contents of an adapter's files, which are an adapter without a name, and the cut of an update to low-rank factors."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.hub.base_layer import BaseLayer
from loraweave.lowrank import algebra
from loraweave.lowrank.factorise import factorise
from loraweave.types import Factors, Fingerprint

MAX_ERROR = 1e-3


@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter's layers by module path of the base model, the base's id and fingerprint (if known), the card, and heads.

    The card is JSON. Heads are whole trained tensors by parameter name of the base (PEFT's modules_to_save), fp32. `files`
    are those beside the weights, unchanged (`KeptFiles`). `invocation` means the same as in `Adapter`.
    """

    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def require_effect(self, where: str, why: str = "every update is zero") -> None:
        """Raise AdapterUnsupported if the adapter changes nothing."""
        if not self.heads and all(map(algebra.is_zero, self.layers.values())):
            raise AdapterUnsupported(f"{where}: the adapter is without effect: {why}")


def require_numbers(layers: Mapping[str, Factors], heads: Mapping[str, Tensor], where: str) -> None:
    """Raise AdapterCorrupt for values beyond fp32, AdapterSuspicious for factors whose product is beyond fp32.

    Also raises AdapterUnsupported for tensors of whole numbers.
    """
    tensors = [tensor for factors in layers.values() for tensor in factors.tensors().values()]
    if algebra.within_range([*tensors, *heads.values()]):
        return
    for layer, factors in layers.items():
        for part, tensor in factors.tensors().items():
            _require_finite(f"{where} layer {layer!r}, {part}", tensor)
        algebra.require_in_range(factors, f"{where} layer {layer!r}")
    for head, tensor in heads.items():
        _require_finite(f"{where} head {head!r}", tensor)


def _require_finite(where: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterUnsupported(
            f"{where} has dtype {tensor.dtype}; only floating point factors have a meaning of their own"
        )
    # as stored: a float64 value can be beyond fp32
    if not algebra.all_finite(values := tensor.float()):
        finite = torch.isfinite(values)
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise AdapterCorrupt(
            f"{where}: {int((~finite).sum())} of {tensor.numel()} values are not finite in fp32, the first "
            f"{float(tensor[first])} at {first}"
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """An update as one matrix (O, I), and the update of the bias (O,), if any."""

    delta_OI: Tensor
    bias_O: Tensor | None = None


@dataclass(frozen=True)
class Bound:
    """The bound of a cut: at most the rank `rank`, at most the error `max_error` (Frobenius norm, relative to the update).

    With both, the cut takes the smallest rank within the error. None sets no bound; a rank alone is used in full.
    """

    rank: int | None = None
    max_error: float | None = MAX_ERROR

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise AdapterUnsupported(f"rank is {self.rank!r}, not a whole number of at least 1")
        if self.max_error is not None and not 0.0 <= self.max_error <= 1.0:
            raise AdapterUnsupported(f"max_error is {self.max_error!r}, not a number from 0 to 1")


def cut_update(
    update: Factors | Dense, bound: Bound, where: str, layer: BaseLayer | None = None
) -> tuple[Factors, dict[str, Any]]:
    """Return the update as factors within the bound, and {rank, relative_error} of the cut for the card.

    Factors stay exactly the same unless their rank is above `bound.rank` or above the smaller side. A matrix gets the
    smallest rank within `max_error`. The factors take the kind and kernel of the base's `layer`, if given. Raises
    AdapterUnsupported, naming both numbers, if the rank leaves a larger error; LayerMismatch for a layer of another size.
    """
    if isinstance(update, Factors):
        sides: tuple[int, ...] = (update.b_OR.shape[0], update.a_RI.shape[1])
        factors, error = _lower(update, bound, where)
    else:
        sides = tuple(update.delta_OI.shape)
        a_RI, b_OR, error = factorise(update.delta_OI.float(), rank=bound.rank, max_error=bound.max_error or 0.0)
        factors = Factors(a_RI, b_OR, bias_O=None if update.bias_O is None else update.bias_O.float())
    if layer is not None:
        if sides != (layer.num_outputs, layer.num_inputs):
            raise LayerMismatch(
                f"{where}: the update has shape (O, I) = {sides}, but the model's {type(layer.module).__name__} has "
                f"{(layer.num_outputs, layer.num_inputs)}"
            )
        factors = replace(factors, kind=layer.kind, kernel=layer.kernel)
    if bound.max_error is not None and error > max(bound.max_error, 1e-6):
        raise AdapterUnsupported(_refusal(update, bound, error, where))
    for name, tensor in factors.tensors().items():
        if not algebra.all_finite(tensor):
            raise AdapterUnsupported(f"{where}: {name} of the update has values that are NaN or infinite in fp32")
    return factors, {"rank": factors.rank, "relative_error": float(error)}


def _lower(factors: Factors, bound: Bound, where: str) -> tuple[Factors, float]:
    # a sum of many terms can have more rank rows than the matrix has rows
    limit = min(factors.a_RI.shape[1], factors.b_OR.shape[0])
    if bound.rank is not None and factors.rank > bound.rank and not factors.bound:
        raise AdapterUnsupported(
            f"{where}: the update has rank {factors.rank} and parts that depend on the base layer (DoRA, a trained bias), "
            f"so it cannot be cut to rank {bound.rank} alone; make plain factors of it first: to_lora(adapter, model)"
        )
    limit = limit if bound.rank is None else min(limit, bound.rank)
    return (factors, 0.0) if factors.rank <= limit or not factors.bound else algebra.compress(factors, limit)


def _refusal(update: Factors | Dense, bound: Bound, error: float, where: str) -> str:
    """Return the text of an error that names the rank that would keep `max_error`, and the `max_error` for this rank."""
    max_error = bound.max_error or 0.0
    if isinstance(update, Factors):
        # never the dense update, which can be far larger than its factors
        factors = algebra.within_sides(update)
        ranks = range(1, factors.rank + 1)
        enough = ranks[bisect_left(ranks, -max_error, key=lambda rank: -algebra.compress(factors, rank)[1])]
    elif max_error:
        enough = factorise(update.delta_OI.float(), max_error=max_error)[0].shape[0]
    else:
        enough = min(update.delta_OI.shape)
    step = 10.0 ** (math.floor(math.log10(error)) - 1)
    allowed = float(f"{min(1.0, math.ceil(error / step + 1e-9) * step):.3g}")
    return (
        f"{where}: rank {bound.rank} leaves a relative error of {error:.3g}, above max_error={bound.max_error}; rank "
        f"{enough} would stay within it, and max_error={allowed} would allow rank {bound.rank}"
    )


def lora_factors(a: Tensor, b: Tensor, embedding: bool, where: str) -> Factors:
    """Return A and B as unscaled factors. Raises AdapterCorrupt if the shapes do not fit, AdapterUnsupported if grouped."""
    shapes = f"A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}"
    kernel = tuple(a.shape[2:])
    if (embedding and kernel) or not 2 <= a.dim() <= 5 or a.dim() != b.dim():
        raise AdapterCorrupt(f"{where} has {shapes}, which are not the factors of a linear layer, embedding or convolution")
    if any(size != 1 for size in b.shape[2:]):
        raise AdapterCorrupt(f"{where} has {shapes}; the second convolution of an update has kernel size 1")
    if kernel and b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
        raise AdapterUnsupported(f"{where} has {shapes}: a convolution in groups, which is not supported")
    if b.shape[1] != a.shape[0]:
        raise AdapterCorrupt(f"{where} has {shapes}; A's first size and B's second are the rank and must agree")
    return Factors(
        a_RI=a.flatten(1).contiguous(),
        b_OR=b.flatten(1).contiguous(),
        kind="embedding" if embedding else "conv" if kernel else "linear",
        kernel=kernel,
    )
