"""A detector of adapters whose weights look like those with a planted backdoor: a logistic regression on spectra.

Puertolas Merenciano et al. 2026, arXiv 2602.15195: five statistics of the updates of the attention's q, k, v and o, twenty
numbers in all. What we read of it, abstract and accounts, names the statistics and the regression; the averages over layers
and the entropy of squares are our choices. docs/extensions/trust.md says how well it works.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraweave import Adapter, AdapterUnsupported, Factors
from loraweave.extend import algebra

Array = NDArray[np.float64]

STATISTICS = ("leading", "norm", "energy", "entropy", "kurtosis")

# the number of entries of an update that are processed together
_BLOCK = 2**22


def spectral_statistics(factors: Factors) -> Array:
    """Return the five STATISTICS of an update b a that is not zero, with singular values s and entries w.

    leading = s_1, norm = sqrt(sum of s_i^2), energy = s_1^2 / sum of s_i^2, entropy = -sum of p_i ln p_i with p_i = s_i^2 /
    sum of s_j^2, kurtosis = mean of (w - mean w)^4 / (mean of (w - mean w)^2)^2, which is 3 for a normal distribution.
    Raises AdapterUnsupported for an update of zero, and for one with a magnitude or gain (DoRA, (IA)3).
    """
    if not factors.bound or factors.gain_O is not None:
        raise AdapterUnsupported("an update with a magnitude or gain (DoRA, (IA)3) has no spectrum without its base")
    b_OR, a_RI = factors.b_OR.double(), factors.a_RI.double()
    if algebra.is_zero(factors):
        raise AdapterUnsupported("an update of zero has no spectrum")
    s_R = torch.linalg.svdvals(algebra.orthonormal(a_RI, b_OR)[1]).numpy()
    p_R = s_R**2 / (s_R**2).sum()
    entropy = -float((p_R[p_R > 0] * np.log(p_R[p_R > 0])).sum())
    count = b_OR.shape[0] * a_RI.shape[1]
    mean = float(b_OR.sum(dim=0) @ a_RI.sum(dim=1)) / count
    second = fourth = 0.0
    size = max(1, _BLOCK // a_RI.shape[1])
    for start in range(0, len(b_OR), size):
        squares_NI = (b_OR[start : start + size] @ a_RI - mean).square_()
        second, fourth = second + float(squares_NI.sum()), fourth + float(squares_NI.square_().sum())
    return np.array([s_R[0], np.linalg.norm(s_R), p_R[0], entropy, fourth * count / second**2])


def signature(adapter: Adapter) -> dict[str, Array]:
    """Return the mean of each statistic over the layers of each projection, the last part of their names ("q_proj").

    Layers with an update of zero are left out. Raises AdapterUnsupported if none is left, and as `spectral_statistics`.
    """
    statistics = defaultdict(list)
    for name, factors in adapter.layers.items():
        if not (factors.bound and factors.gain_O is None and algebra.is_zero(factors)):
            statistics[name.rpartition(".")[2]].append(spectral_statistics(factors))
    if not statistics:
        raise AdapterUnsupported(f"adapter {adapter.name!r} has no update that is not zero")
    return {projection: np.mean(statistics[projection], axis=0) for projection in sorted(statistics)}


@dataclass(frozen=True)
class BackdoorDetector:
    """A detector: probability = 1 / (1 + exp(-(intercept + sum of coefficient * (statistic - mean) / scale))).

    The numbers of all projections are in one row, those of a projection in the order of STATISTICS. It is valid only for
    adapters of the kind that it was fitted on: another rank, learning rate or number of steps moves the statistics, too.
    """

    projections: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float

    @classmethod
    def fit(cls, clean: Iterable[Adapter], poisoned: Iterable[Adapter]) -> BackdoorDetector:
        """Return the logistic regression with L2 penalty 1 on standardised statistics (scikit-learn's default).

        Raises AdapterUnsupported for fewer than two adapters on either side, and for other projections than the first's.
        """
        sides = [[signature(adapter) for adapter in side] for side in (clean, poisoned)]
        if min(map(len, sides)) < 2:
            raise AdapterUnsupported(
                f"a detector is fitted on clean and on poisoned adapters, here {len(sides[0])} and {len(sides[1])}: give "
                "two of each at least, of one base, and a hundred to trust it"
            )
        projections = tuple(sides[0][0])
        x_NF = np.stack([_row(by_projection, projections) for side in sides for by_projection in side])
        return cls.from_statistics(projections, x_NF, [0] * len(sides[0]) + [1] * len(sides[1]))

    @classmethod
    def from_statistics(cls, projections: Sequence[str], x_NF: Array, poisoned_N: Any) -> BackdoorDetector:
        """Return the detector fitted to signatures x_NF, one row an adapter, and poisoned_N, True for poisoned ones."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x_NF)
        model = LogisticRegression(max_iter=5000).fit(scaler.transform(x_NF), poisoned_N)
        rows = (scaler.mean_, scaler.scale_, model.coef_[0])
        means, scales, coefficients = (tuple(map(float, row)) for row in rows)
        return cls(tuple(projections), means, scales, coefficients, float(model.intercept_[0]))

    def probability(self, adapter: Adapter) -> float:
        """Return the probability of a backdoor, 0 to 1. Raises AdapterUnsupported for other projections than the fit's."""
        return float(self.probabilities(_row(signature(adapter), self.projections)[None])[0])

    def probabilities(self, x_NF: Array) -> Array:
        """Return the probability of a backdoor (N) for each row of x_NF, an adapter's signature."""
        z_N = self.intercept + (x_NF - np.array(self.means)) / np.array(self.scales) @ np.array(self.coefficients)
        probability_N: Array = 1 / (1 + np.exp(-z_N))
        return probability_N


def _row(found: Mapping[str, Array], projections: Sequence[str]) -> Array:
    if tuple(found) != tuple(projections):
        raise AdapterUnsupported(
            f"the adapter updates {', '.join(found)}, and the detector knows {', '.join(projections)}: fit one on adapters "
            "that update the same"
        )
    return np.concatenate([found[projection] for projection in projections])
