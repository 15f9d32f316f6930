"""Spherical interpolation between two updates, as a whole or row by row."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraweave import Factors, WeightingError
from loraweave.extend import algebra, get, traits
from loraweave.extend.merging import Experts, Weights, combination, shares, terms

# cosine of 1e-4: on a smaller angle to a line, fp32 factors no longer say which great circle leads from one to the other
MAX_COSINE = 1.0 - 0.5e-8


@traits("pairs", "shares")
def nuslerp(experts: Experts, weights: Weights, *, row_wise: bool = False) -> Factors:
    """Return one layer's sin((1-t) A)/sin A * D_1 + sin(t A)/sin A * D_2, with an angle A for the layer or for each row.

    t = w_2 / (w_1 + w_2). Two experts of other weights than zero, or one, which comes back as it is. With `row_wise` each
    output's row of the updates is a vector of its own, which scales the rows of b and keeps the rank at R_1 + R_2. The
    coefficients go onto the updates themselves, so that their lengths take part. Vectors on one line (an angle below 1e-4),
    zero ones and absent layers give (1-t) D_1 + t D_2.

    mergekit's method of that name with a base model; there the rows of a weight are the vectors under
    nuslerp_flatten=false, and nuslerp_row_wise takes its columns. Unlike `slerp`, it rotates nearly parallel updates too.
    Biases take the coefficients of the updates (of their row). Raises WeightingError for three experts or more.
    """
    if not row_wise:
        turned: Factors = get("methods", "slerp")(experts, weights, collinear=MAX_COSINE)
        return turned
    terms_E = terms(experts, pair_shares(weights))
    updates, parts = [term.factors for term in terms_E], [term.weight for term in terms_E]
    if len(updates) == 1:
        return combination(updates, parts)
    rows_EO = interpolation(_row_gram(updates), parts, max_cosine=MAX_COSINE)
    return algebra.add([_with_rows(update, row_O) for update, row_O in zip(updates, rows_EO, strict=True)])


def _row_gram(updates: Sequence[Factors]) -> Tensor:
    """Return the inner products of the updates' rows, (2, 2, O), float64."""
    a, b = [f.a_RI.double() for f in updates], [f.b_OR.double() for f in updates]
    rows = [[((b[i] @ (a[i] @ a[j].T)) * b[j]).sum(dim=1) for j in range(2)] for i in range(2)]
    return torch.stack([torch.stack(row) for row in rows])


def _with_rows(update: Factors, scale_O: Tensor) -> Factors:
    bias_O = None if update.bias_O is None else (update.bias_O.double() * scale_O).float()
    return replace(update, b_OR=(update.b_OR.double() * scale_O[:, None]).float(), bias_O=bias_O)


def pair_shares(weights: Weights) -> list[float]:
    """Return the weights over their sum. Raises WeightingError for more than two that are not zero, or a negative one."""
    count = sum(weight != 0.0 for weight in weights)
    if count > 2:
        raise WeightingError(
            f"the method interpolates between two experts and got {count}: merge two at a time, or use a method that takes "
            "any number, such as linear"
        )
    return shares(weights)


def interpolation(inner_EE: Tensor, parts: Sequence[float], *, max_cosine: float) -> Tensor:
    """Return the coefficients of spherical interpolation, (2,) or (2, O), for inner products (2, 2) or (2, 2, O), float64.

    `parts` are the shares 1 - t and t; they are the coefficients where |cos| is above `max_cosine` or a norm is zero.
    """
    norm_E = torch.stack([inner_EE[0, 0], inner_EE[1, 1]]).clamp(min=0.0).sqrt()
    scale = norm_E[0] * norm_E[1]
    cosine = torch.where(scale > 0.0, inner_EE[0, 1] / torch.where(scale > 0.0, scale, 1.0), 1.0).clamp(-1.0, 1.0)
    straight = (cosine.abs() > max_cosine) | (cosine.abs() == 1.0)
    angle = torch.where(straight, 1.0, cosine.acos())
    rows = [torch.where(straight, part, (part * angle).sin() / angle.sin()) for part in parts]
    return torch.stack(rows)
