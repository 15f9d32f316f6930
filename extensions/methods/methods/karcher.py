"""The centre of the updates' directions on the sphere (Karcher mean)."""

import math

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import Count, NonNegative, traits
from loraweave.extend.merging import Experts, Weights, combination, gram, shares, terms


@traits("shares")
def karcher(experts: Experts, weights: Weights, *, tolerance: NonNegative = 1e-9, max_steps: Count = 100) -> Factors:
    """Return one layer's direction m of least sum of p_e angle(m, D_e)^2, times the mean of the norms, sum of p_e |D_e|.

    Riemannian centre of mass (Karcher 1977) of unit vectors, each update being one long vector, by gradient steps
    m <- Exp_m(sum of p_e Log_m(D_e / |D_e|)) from their normalised mean until a step turns m by less than `tolerance`
    radians or after `max_steps`. As m stays in the span of the updates, the steps need their Gram matrix alone, in float64,
    and the result is exact, of rank sum of R_e.

    p_e = w_e over the sum of the weights; mergekit's are all equal. Zero updates and absent layers have no direction and
    bring their share of norm 0. Directions whose mean vanishes (opposite ones) have no one centre and give the mean of the
    updates. Biases take the coefficients of the updates.
    """
    terms_E = terms(experts, shares(weights))
    updates = [term.factors for term in terms_E]
    part_E = torch.tensor([term.weight for term in terms_E], dtype=torch.float64)
    inner_EE = gram(updates)
    norm_E = inner_EE.diagonal().clamp(min=0.0).sqrt()
    directed = norm_E > 0.0
    coefficient_E = part_E.clone()
    if int(directed.sum()) > 1:
        unit_EE = (inner_EE / norm_E / norm_E[:, None])[directed][:, directed]
        centre_E = _centre(unit_EE, part_E[directed] / part_E[directed].sum(), tolerance, max_steps)
        if centre_E is not None:
            coefficient_E[directed] = float(part_E @ norm_E) * centre_E / norm_E[directed]
    return combination(updates, coefficient_E.tolist())


def _centre(unit_EE: Tensor, part_E: Tensor, tolerance: float, max_steps: int) -> Tensor | None:
    """Return the coefficients (E) of the centre of unit vectors with Gram matrix `unit_EE` and shares `part_E`.

    None if the vectors' mean has no direction.
    """
    length = _length(unit_EE, part_E)
    if length < 1e-6:
        return None
    centre_E = part_E / length
    for _ in range(max_steps):
        cosine_E = (unit_EE @ centre_E).clamp(-1.0, 1.0)
        angle_E = cosine_E.acos()
        # the opposite point is reached by every direction alike, so it pulls nowhere
        pull_E = torch.where(angle_E > math.pi - 1e-6, 0.0, part_E / torch.sinc(angle_E / math.pi))
        tangent_E = pull_E - (pull_E @ cosine_E) * centre_E
        turn = _length(unit_EE, tangent_E)
        if turn <= tolerance:
            break
        centre_E = math.cos(turn) * centre_E + math.sin(turn) / turn * tangent_E
        centre_E = centre_E / _length(unit_EE, centre_E)
    return centre_E


def _length(unit_EE: Tensor, coefficient_E: Tensor) -> float:
    return math.sqrt(max(float(coefficient_E @ unit_EE @ coefficient_E), 0.0))
