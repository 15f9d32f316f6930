"""Clusters of a pool's adapters that change the model alike: the first half of model-based clustering (MBC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.hub.truncation import summed_by_owner
from loraweave.hub.whole_number import is_whole

# k of the published library of 256 tasks
NUM_CLUSTERS = 10


def clusters(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter], *, num_clusters: int = NUM_CLUSTERS, seed: int = 0
) -> list[tuple[str, ...]]:
    """The names of the pool's adapters in at most `num_clusters` groups, the largest first (MBC, Ostapenko et al. 2024).

    k-means over the rows of the adapters' cosine similarities, as in arXiv 2405.11157. The similarity is that of the whole
    updates (`similarities`), which no choice of factors changes; the published code compares the factors' own entries, and
    so two trainings from different starts as if they were unlike. MBC then trains one adapter on the tasks of each cluster:
    `lw.train_adapters(model, tokenizer, {" ".join(names): [*of those tasks' examples] for names in clusters(pool)})`.

    Raises WeightingError for more clusters than adapters, and for an adapter without any update.
    """
    from sklearn.cluster import KMeans

    pool = pool if isinstance(pool, ExpertPool) else ExpertPool(pool)
    if not is_whole(num_clusters, 1) or num_clusters > len(pool):
        raise WeightingError(
            f"num_clusters is {num_clusters!r}, but the pool has {len(pool)} adapters; it is a whole number from 1 to that"
        )
    found_E = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(similarities(pool))
    groups: dict[int, list[str]] = {}
    for name, cluster in zip(pool.names, found_E.tolist(), strict=True):
        groups.setdefault(cluster, []).append(name)
    # of equal sizes, that of the adapter named first
    return [tuple(names) for names in sorted(groups.values(), key=len, reverse=True)]


def similarities(pool: ExpertPool) -> NDArray[np.float64]:
    """cos_EE of the updates of all layers side by side, from the factors alone; what a layer has not is zero there.

    Gains and biases do not enter. Raises AdapterUnsupported for unbound updates, WeightingError for an update of zero.
    """
    inner_EE = np.zeros((len(pool), len(pool)))
    for layer in pool.layer_names:
        factors = pool.stacked(layer)
        a_SI, b_OS = factors.a_SI.double(), factors.b_OS.double()
        product_SS = ((a_SI @ a_SI.T) * (b_OS.T @ b_OS)).numpy()
        ranks = torch.bincount(factors.owner_S, minlength=len(pool)).tolist()
        inner_EE += summed_by_owner(product_SS, ranks)
    norms_E = np.sqrt(inner_EE.diagonal())
    for name, norm in zip(pool.names, norms_E.tolist(), strict=True):
        if norm == 0:
            raise WeightingError(f"adapter {name!r} updates nothing, and is like no other: leave it out")
    cosines_EE: NDArray[np.float64] = inner_EE / (norms_E * norms_E[:, None])
    return cosines_EE
