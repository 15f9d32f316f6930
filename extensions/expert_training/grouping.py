"""Groups of similar adapters, whatever their factors: k-means over the cosines of their updates."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from loraweave import Adapter, ExpertPool, Hub, LayerMismatch, WeightingError
from loraweave.extend import is_whole, progress_bar, require_all, spread

# k of the published library of 256 tasks
NUM_CLUSTERS = 10


def clusters(
    pool: Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    *,
    num_clusters: int = NUM_CLUSTERS,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: bool = True,
) -> list[tuple[str, ...]]:
    """Group the names of the pool's adapters in at most `num_clusters`, the largest first (MBC, Ostapenko et al. 2024).

    K-means runs over the rows of the adapters' cosine similarities, as in arXiv 2405.11157. The similarity is that of the
    whole updates (`similarities`), which no choice of factors changes; the published code compares the factors' own entries,
    and so two trainings from different starts as if they were unlike. MBC then trains one adapter on each cluster's tasks:
    `lw.train_adapters(model, tokenizer, {" ".join(names): [*of those tasks' examples] for names in clusters(pool)})`.

    `n_jobs` workers, or those that `joblib.parallel_config` names, compare blocks of adapters, to the same bits; they open
    those of a hub themselves. Raises WeightingError for more clusters than adapters, and for an adapter without any update.
    """
    from sklearn.cluster import KMeans

    if not isinstance(pool, Hub):
        pool = ExpertPool.of(pool)
    if not is_whole(num_clusters, 1) or num_clusters > len(pool):
        raise WeightingError(
            f"num_clusters is {num_clusters!r}, but the pool has {len(pool)} adapters; it is a whole number from 1 to that"
        )
    names, cosines_EE = similarities(pool, n_jobs=n_jobs, progress=progress)
    found_E = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(cosines_EE)
    groups: dict[int, list[str]] = {}
    for name, cluster in zip(names, found_E.tolist(), strict=True):
        groups.setdefault(cluster, []).append(name)
    # of equal sizes, that of the adapter named first
    return [tuple(names) for names in sorted(groups.values(), key=len, reverse=True)]


# the adapters on either side of the block that is one piece of work
BLOCK = 64
Side = ExpertPool | Sequence[str]


def similarities(
    pool: Hub | ExpertPool, *, n_jobs: int | None = None, progress: bool = True
) -> tuple[Sequence[str], NDArray[np.float64]]:
    """Return (names, cos_EE): the adapters' names and the cosines of their updates, all layers side by side.

    They are calculated from the factors; a layer that an adapter lacks is zero, gains and biases are left out. Raises
    AdapterUnsupported for unbound updates, WeightingError for an update of zero, LayerMismatch for layers of several shapes.
    """
    hub = pool if isinstance(pool, Hub) else None
    names = pool.names if isinstance(pool, ExpertPool) else [record.name for record in pool.records()]
    parts = [range(start, min(start + BLOCK, len(names))) for start in range(0, len(names), BLOCK)]
    part_names = [[names[place] for place in part] for part in parts]
    sides: list[Side] = part_names if isinstance(pool, Hub) else [pool.subset(part) for part in part_names]  # type: ignore[assignment]
    places = {f"{a + 1} x {b + 1} of {len(parts)}": (a, b) for a in range(len(parts)) for b in range(a, len(parts))}
    pieces = {name: (sides[a], sides[b]) for name, (a, b) in places.items()}
    inner_EE = np.zeros((len(names), len(names)))
    with progress_bar(progress and len(pieces) > 1) as bar:
        work = partial(_inner_products, hub)
        for name, inner_EF in require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="comparing", bar=bar))).items():
            rows, columns = (parts[place] for place in places[name])
            inner_EE[np.ix_(rows, columns)], inner_EE[np.ix_(columns, rows)] = inner_EF, inner_EF.T
    norms_E = np.sqrt(inner_EE.diagonal())
    for name, norm in zip(names, norms_E.tolist(), strict=True):
        if norm == 0:
            raise WeightingError(f"adapter {name!r} updates nothing, and is like no other: leave it out")
    cosines_EE: NDArray[np.float64] = inner_EE / (norms_E * norms_E[:, None])
    return names, cosines_EE


def _inner_products(hub: Hub | None, sides: tuple[Side, Side]) -> NDArray[np.float64]:
    """Return inner_EF, the inner products of the updates of E and F adapters; `sides` are pools, or names in the hub."""
    left, right = (side if isinstance(side, ExpertPool) else cast(Hub, hub).pool(side) for side in sides)
    inner_EF = torch.zeros(len(left), len(right), dtype=torch.float64)
    there = set(right.layer_names)
    for layer in [layer for layer in left.layer_names if layer in there]:
        one, other = left.stacked(layer), right.stacked(layer)
        shapes = [(len(stack.b_OS), stack.a_SI.shape[1]) for stack in (one, other)]
        if shapes[0] != shapes[1]:
            raise LayerMismatch(
                f"layer {layer!r} has shape {shapes[0]} in {left.names[0]!r}, {shapes[1]} in {right.names[0]!r}"
            )
        product_ST = (one.a_SI.double() @ other.a_SI.double().T) * (one.b_OS.double().T @ other.b_OS.double())
        rows_ET = product_ST.new_zeros(len(left), product_ST.shape[1]).index_add_(0, one.owner_S, product_ST)
        inner_EF.index_add_(1, other.owner_S, rows_ET)
    return inner_EF.numpy()
