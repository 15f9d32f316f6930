"""Rank-one units of all adapters, clustered and averaged: LoRA-LEGO (Zhao et al., ICLR 2025, arXiv 2409.16167)."""

import warnings
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave import Factors
from loraweave.extend import Count, Range, traits
from loraweave.extend.merging import Experts, Term, Weights, empty_update, terms, weighted_bias
from loraweave.extensions.methods.methods._core import as_factors


@traits("by_factors")
def lego(
    experts: Experts,
    weights: Weights,
    *,
    num_clusters: Count | None = None,
    reweight: bool = True,
    random_state: Annotated[int, Range(least=0, below=2**32)] = 0,
) -> Factors:
    """Return one layer rebuilt from k minimal semantic units: the centroids of clusters of all experts' rank-one units.

    A unit is a row of a with its column of b times w_e. Units are clustered by k-means on [a / |a|; b / |b|]; each cluster
    gives the mean of its units, not the sum. `reweight` restores what averaging takes (dual re-weighting): a centroid [a; b]
    is scaled to the mean largest magnitude of its units, and the update by sqrt(r / k), r being the largest rank. k =
    `num_clusters`, by default r, and never more than there are different units. With k = sum of ranks and no re-weighting
    the result is the weighted sum exactly; a single expert comes back as it is.

    A unit and its negative (-a, -b) are one update: signs are first aligned along the strongest similarities (the
    third-party code known to us leaves them). The result depends on how an update is split, since units are rows of a as
    stored. Rows or columns of zeros are not units. k-means is scikit-learn's, of seed `random_state`, on the units in a
    fixed order, so the order of experts does not matter. The LoRA scale is in b. Biases are summed with weights.
    """
    terms_E = terms(experts, weights)
    first, bias_O = terms_E[0].factors, weighted_bias(terms_E)
    a_NI, b_NO = _units(terms_E)
    if not len(a_NI):
        return empty_update(first, bias_O)
    rank = max(term.factors.rank for term in terms_E)
    features_ND = torch.cat([a_NI / a_NI.norm(dim=1, keepdim=True), b_NO / b_NO.norm(dim=1, keepdim=True)], dim=1)
    sign_N1 = _signs(features_ND.numpy())[:, None]
    a_NI, b_NO, features_ND = a_NI * sign_N1, b_NO * sign_N1, features_ND * sign_N1
    labels_N = _clusters(features_ND.numpy(), rank if num_clusters is None else num_clusters, random_state)
    a_KI, b_KO = _centroids(a_NI, b_NO, labels_N, reweight)
    factor = (rank / len(a_KI)) ** 0.5 if reweight else 1.0
    return as_factors(first, b_KO.T * factor, a_KI, bias_O)


def _units(found: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Return the experts' rank-one units other than zero, a_NI and weighted b_NO, in an order that depends on them alone."""
    a_NI = torch.cat([term.factors.a_RI.double() for term in found])
    b_NO = torch.cat([term.factors.b_OR.double().T * term.weight for term in found])
    alive_N = a_NI.any(dim=1) & b_NO.any(dim=1)
    a_NI, b_NO = a_NI[alive_N], b_NO[alive_N]
    keys = [a.numpy().tobytes() + b.numpy().tobytes() for a, b in zip(a_NI, b_NO, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return a_NI[order], b_NO[order]


def _signs(features_ND: NDArray[np.float64]) -> Tensor:
    """Return 1 or -1 for each unit, so that neighbours in the maximum spanning tree of |cosine| point alike (Prim)."""
    similarity_NN = features_ND @ features_ND.T
    sign_N = np.ones(len(features_ND))
    best_N, parent_N = np.abs(similarity_NN[0]), np.zeros(len(features_ND), dtype=int)
    best_N[0] = -1.0
    for _ in range(len(features_ND) - 1):
        new = int(best_N.argmax())
        parent = parent_N[new]
        sign_N[new] = sign_N[parent] * (-1.0 if similarity_NN[new, parent] < 0 else 1.0)
        closer_N = (np.abs(similarity_NN[new]) > best_N) & (best_N >= 0)
        best_N[closer_N], parent_N[closer_N] = np.abs(similarity_NN[new])[closer_N], new
        best_N[new] = -1.0
    return torch.from_numpy(sign_N)


def _clusters(features_ND: NDArray[np.float64], k: int, random_state: int) -> Tensor:
    """Return the cluster of each unit, 0 to at most k - 1; every unit its own when there are no more than k."""
    if k >= len(features_ND):
        return torch.arange(len(features_ND))
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    different = len(np.unique(features_ND.round(6), axis=0))
    with warnings.catch_warnings():
        # units that are equal but for rounding make fewer clusters than asked for, which is what should happen
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(min(k, different), n_init=10, random_state=random_state).fit(features_ND)
    return torch.from_numpy(np.unique(means.labels_, return_inverse=True)[1])


def _centroids(a_NI: Tensor, b_NO: Tensor, labels_N: Tensor, reweight: bool) -> tuple[Tensor, Tensor]:
    """Return the mean unit of each cluster (a_KI, b_KO), scaled with `reweight` to its units' mean largest magnitude."""
    member_KN = torch.nn.functional.one_hot(labels_N).T.double()
    member_KN = member_KN / member_KN.sum(dim=1, keepdim=True)
    a_KI, b_KO = member_KN @ a_NI, member_KN @ b_NO
    if not reweight:
        return a_KI, b_KO
    peak_N = torch.maximum(a_NI.abs().amax(dim=1), b_NO.abs().amax(dim=1))
    peak_K = torch.maximum(a_KI.abs().amax(dim=1), b_KO.abs().amax(dim=1))
    factor_K1 = (member_KN @ peak_N / peak_K.masked_fill(peak_K == 0, 1.0))[:, None]
    return a_KI * factor_K1, b_KO * factor_K1
