"""Methods that stay in the span of the experts' updates: the Gram matrix of the updates, and sums with any coefficients.

Angles and norms of updates need their inner products only, and those need only products of factors; a sum with
coefficients is a concatenation. So none of these methods forms a dense update.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.merge.method_call import Experts, Weights
from loraweave.errors import WeightingError
from loraweave.lowrank import algebra
from loraweave.lowrank.algebra import summed_by_owner
from loraweave.types import Factors


def gram(updates: Sequence[Factors]) -> Tensor:
    """Return <D_i, D_j> of every pair as (E, E), float64, symmetric."""
    a_SI = torch.cat([factors.a_RI for factors in updates]).double()
    b_OS = torch.cat([factors.b_OR for factors in updates], dim=1).double()
    product_SS = (a_SI @ a_SI.T) * (b_OS.T @ b_OS)
    inner_EE = torch.from_numpy(summed_by_owner(product_SS.detach().numpy(), [factors.rank for factors in updates]))
    return (inner_EE + inner_EE.T) / 2


def combination(updates: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Return the sum of c_e update_e, exactly; gains and biases are summed the same way, and coefficients of zero drop out.

    The result is always new memory, and an update of rank 0 when all coefficients are zero. Raises LayerMismatch for updates
    of different shape, AdapterUnsupported for an unbound update, unless it is the only one and its coefficient is 1.
    """
    parts = [algebra.scale(update, c) for update, c in zip(updates, coefficients, strict=True) if c != 0.0]
    if not parts:
        return empty_update(updates[0])
    total = algebra.add(parts)
    if len(parts) > 1:
        return total
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in total.tensors().items()}
    return replace(total, **copies)


def empty_update(like: Factors, bias_O: Tensor | None = None) -> Factors:
    """Return an update of rank 0 with the shape of `like`, and `bias_O` if given."""
    a_RI, b_OR = like.a_RI.new_zeros(0, like.a_RI.shape[1]), like.b_OR.new_zeros(like.b_OR.shape[0], 0)
    return Factors(a_RI.float(), b_OR.float(), bias_O=bias_O, kind=like.kind, kernel=like.kernel)


def counted(experts: Experts, weights: Weights) -> tuple[list[Factors], list[float]]:
    """Return the factors of the experts that have the layer and a weight other than zero, and their weights."""
    pairs = [(f, float(w)) for f, w in zip(experts, weights, strict=True) if f is not None and w != 0.0]
    return [factors for factors, _ in pairs], [weight for _, weight in pairs]


def mean_weights(weights: Weights) -> list[float]:
    """Return the weights over their sum. Raises WeightingError if the sum is zero, unless all weights are."""
    values = [float(weight) for weight in weights]
    total = sum(values)
    if total == 0.0 and any(values):
        raise WeightingError(
            f"the method divides by the sum of the weights, and {_listed(values)} sum to 0: use task_arithmetic or linear, "
            "which do not divide"
        )
    return [value / total for value in values] if total else values


def shares(weights: Weights) -> list[float]:
    """Return the weights over their sum, for formulas in which they are shares. Raises WeightingError for a negative one."""
    if any(weight < 0.0 for weight in weights):
        raise WeightingError(
            f"the method takes the weights as shares, which are positive, but got {_listed(weights)}: use linear, which "
            "takes weights of any sign"
        )
    return mean_weights(weights)


def _listed(weights: Weights) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)
