"""Aggregation of clients of different ranks: the mean update, decomposed again (FlexLoRA)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from loraweave import Adapter, Factors, WeightingError, merge
from loraweave.extend import algebra, get, is_whole, traits
from loraweave.extend.merging import Experts, TruncatedUpdate, Weights, shares


@traits("shares")
def flexlora(experts: Experts, weights: Weights, *, rank: int | None = None) -> TruncatedUpdate:
    """Return one layer's mean update cut to `rank`, with b = U Sigma and a = V^T (Bai et al. 2024, arXiv 2402.11505).

    Weights are the clients' sizes: only their proportions count. `rank` is by default the largest among the experts with
    weight. Rows of a are orthonormal and ordered by singular value, so that the first r of them are the best approximation
    of rank r: `flexlora_clients` takes all clients' adapters from one decomposition. Computed from the factors alone, in
    float64. An expert without the layer is a zero update. Gains and biases take the mean.
    """
    truncated: TruncatedUpdate = get("methods", "svd")(experts, shares(weights), rank=rank)
    # if the only client's update needs the base layer, the factors stay as the cut left them
    return replace(truncated, factors=_right_orthonormal(truncated.factors)) if truncated.factors.bound else truncated


def _right_orthonormal(factors: Factors) -> Factors:
    """Return the same update with the rows of a orthonormal and b = U Sigma, largest first."""
    q_OR, core_RR, p_IR = algebra.orthonormal(factors.a_RI, factors.b_OR)
    u_RR, sigma_R, vh_RR = torch.linalg.svd(core_RR, full_matrices=False)
    return replace(factors, a_RI=(vh_RR @ p_IR.T).float(), b_OR=(q_OR @ (u_RR * sigma_R)).float())


def flexlora_clients(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    ranks: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    heads: str = "error",
) -> list[Adapter]:
    """Return the clients' mean update at each of `ranks`: the best approximations, from one decomposition of each layer.

    FlexLoRA (Bai et al. 2024, arXiv 2402.11505): weights are the clients' sizes, positive shares, and client i gets b = U
    Sigma and a = V^T cut to ranks[i], or the whole rank where that is smaller. The report has the error of each cut.
    `names` are those of the results, "flexlora-r8" and so on by default.

    Raises WeightingError for ranks that are missing or below 1 or above the largest layer's smaller side, and for names
    that do not fit, beside what `merge` raises.
    """
    if not ranks:
        raise WeightingError("flexlora_clients takes one rank for each client, and got none")
    for client, rank in enumerate(ranks, start=1):
        if not is_whole(rank, 1):
            raise WeightingError(f"rank {rank!r} of client {client} is not a whole number of 1 or more")
    if names is not None and len(names) != len(ranks):
        raise WeightingError(f"flexlora_clients got {len(ranks)} ranks and {len(names)} names; it takes one for each")
    mean = merge(adapters, weights, method="flexlora", rank=max(ranks), heads=heads, progress=False)
    whole = {layer: _by_size(factors) for layer, factors in mean.layers.items()}
    labels = names if names is not None else [f"flexlora-r{rank}" for rank in ranks]
    return [_cut(mean, whole, rank, label) for rank, label in zip(ranks, labels, strict=True)]


def _by_size(factors: Factors) -> Factors:
    """Return b = U Sigma and a = V^T of factors whose rows of a and columns of b are orthogonal, largest first."""
    norm_R = factors.a_RI.double().norm(dim=1)
    a_RI = factors.a_RI.double() / norm_R.clamp(min=1e-300)[:, None]
    b_OR = factors.b_OR.double() * norm_R
    order_R = b_OR.norm(dim=0).argsort(descending=True, stable=True)
    return replace(factors, a_RI=a_RI[order_R].float(), b_OR=b_OR[:, order_R].float())


def _cut(mean: Adapter, whole: dict[str, Factors], rank: int, name: str) -> Adapter:
    layers, rows = {}, {}
    for layer, factors in whole.items():
        layers[layer] = replace(factors, a_RI=factors.a_RI[:rank].clone(), b_OR=factors.b_OR[:, :rank].clone())
        rows[layer] = _figures(mean.report[layer], factors, rank)
    recipe: dict[str, Any] = {**mean.card["recipe"], "rank": rank}
    report = replace(mean.report, layers=rows).to_json()
    return replace(mean, name=name, layers=layers, card={**mean.card, "recipe": recipe, "report": report})


def _figures(row: Any, factors: Factors, rank: int) -> Any:
    """Return `row`, a layer's figures of its mean update, for a further cut to `rank`: both cuts' lost energies add up."""
    energy_R = factors.b_OR.double().norm(dim=0).square()
    lost = row.relative_error**2
    tail = float(energy_R[rank:].sum() / energy_R.sum()) if bool(energy_R.any()) else 0.0
    return replace(row, rank_out=min(rank, factors.rank), relative_error=(lost + (1.0 - lost) * tail) ** 0.5)
