"""Adapters made of adapters without a model: in few bits, of lower rank, without a common part; and groups of similar ones.

All raise WeightingError for numbers out of range, and LayerMismatch for adapters that do not fit together. Nothing that is
given changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave.common.checks import is_whole
from loraweave.common.display import progress_bar, tracked
from loraweave.common.options import Count, Positive, Share, check_options, options_of
from loraweave.common.spread import require_all, spread
from loraweave.composer.merge.merge import merge
from loraweave.errors import AdapterUnsupported, LayerMismatch, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.lowrank import algebra
from loraweave.types import Factors

FACTORS = ("a_RI", "b_OR")


def compeft(
    adapter: Adapter,
    *,
    density: Share = 0.2,
    scale: Positive | Literal["least_squares"] = 1.0,
    per: Literal["adapter", "tensor"] = "adapter",
) -> Adapter:
    """Return the adapter with all values of its factors a and b turned into -c, 0 or c: ComPEFT (Yadav et al. 2023, Alg. 1).

    Of the vector tau of all entries of all a and b, the floor(density * n) largest by magnitude stay (fewer only where tau
    has fewer non-zeros; of equal ones the first), as c * sign(tau) with c = scale * std(tau), std over the whole of tau
    before it was cut. `density` in (0, 1]; `scale` above 0, the alpha that the paper tunes between 0.5 and 10, or
    "least_squares" for the c nearest to tau, which is the mean magnitude of what stays. With per="tensor" each a and b is
    its own tau. Gains, biases, magnitudes and heads stay as they are.

    tau is that of the factors as stored, with the LoRA scale in b: the result depends on how an update is split into a and
    b. Where the entries of b are far smaller than those of a, one tau for all leaves nothing of b; per="tensor" is then the
    way. The card has the relative error of tau. `Hub.add(..., stored_as="compeft")` stores the result in few bits.

    Raises WeightingError for options outside their range, AdapterUnsupported when nothing would be left of the update, and
    for a std of 0.
    """
    options = {"density": density, "scale": scale, "per": per}
    check_options("compeft", options, options_of(compeft, after=1))
    places = [(layer, part) for layer in sorted(adapter.layers) for part in FACTORS]
    tensors = [adapter.layers[layer].tensors()[part].detach().float() for layer, part in places]
    groups = [range(len(places))] if per == "adapter" else [range(n, n + 1) for n in range(len(places))]
    ternary: dict[tuple[str, str], Tensor] = {}
    error = total = 0.0
    for group in groups:
        tau = torch.cat([tensors[n].flatten() for n in group])
        layer, part = places[group[0]]
        where = f"adapter {adapter.name!r}" if per == "adapter" else f"{part} of layer {layer!r}"
        ternary_tau = _ternary(tau, density, scale, where)
        error += float((ternary_tau.double() - tau.double()).square().sum())
        total += float(tau.double().square().sum())
        pieces = torch.split(ternary_tau, [tensors[n].numel() for n in group])
        for n, piece in zip(group, pieces, strict=True):
            # cloned: pieces of one vector would keep all of it alive, and cannot be stored apart
            ternary[places[n]] = piece.reshape(tensors[n].shape).clone()
    layers = {
        layer: replace(factors, a_RI=ternary[layer, "a_RI"], b_OR=ternary[layer, "b_OR"])
        for layer, factors in adapter.layers.items()
    }
    if all(map(algebra.is_zero, layers.values())):
        raise AdapterUnsupported(
            f"compeft leaves nothing of adapter {adapter.name!r}: in each layer all of a or all of b is among the "
            f"entries that density={density:g} drops; use per='tensor' or a higher density"
        )
    return _derive(adapter, layers, "compeft", options, {"relative_error": (error / total) ** 0.5 if total else 0.0})


def byom(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with every layer's b a cut to at most `rank` by its singular values: BYOM-LoRA (Jiang et al. 2023).

    The cut is the best approximation of each update at that rank, so one of lower rank stays as it is and `rank` = its own
    loses nothing. The card has the relative Frobenius error by layer and in all. Gains, biases, magnitudes (DoRA's, whose b
    a is cut) and heads stay. The result is an ordinary adapter of lower rank. Raises WeightingError for a rank below 1.
    """
    check_options("byom", {"rank": rank}, {"rank": Count})
    cuts = {layer: algebra.compress(factors, rank) for layer, factors in adapter.layers.items()}
    squares = {layer: algebra.norm(factors) ** 2 for layer, factors in adapter.layers.items()}
    lost, total = sum(cuts[layer][1] ** 2 * square for layer, square in squares.items()), sum(squares.values())
    errors = {
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
        "layers": {layer: error for layer, (_, error) in cuts.items()},
    }
    return _derive(adapter, {layer: cut for layer, (cut, _) in cuts.items()}, "byom", {"rank": rank}, errors)


def _ternary(tau: Tensor, density: float, scale: float | str, where: str) -> Tensor:
    """Return c * sign(tau) on the largest entries of a vector, zero elsewhere."""
    # as the decimal number that was written: 0.29 * 100 is below 29 in binary
    count = int(Decimal(repr(float(density))) * tau.numel())
    magnitude = tau.abs()
    kept = _largest(magnitude, count)
    if scale == "least_squares":
        c = float(magnitude[kept].double().mean()) if bool(kept.any()) else 0.0
    else:
        c = float(scale) * float(tau.double().std(correction=0)) if tau.numel() else 0.0
        if c == 0.0 and bool(kept.any()):
            raise AdapterUnsupported(
                f"compeft: the {tau.numel()} entries of {where} are all equal, so that their standard deviation, which is "
                "the scale, is 0; use scale='least_squares'"
            )
    return torch.where(kept, tau.sign() * c, 0.0)


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Return which `count` entries are largest, of equal ones the first; zeros are never among them."""
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    least = magnitude.kthvalue(magnitude.numel() - count + 1).values
    kept = magnitude > least
    ties = (magnitude == least).nonzero()[: count - int(kept.sum()), 0]
    kept[ties] = True
    return kept & (magnitude > 0)


def _derive(
    adapter: Adapter,
    layers: Mapping[str, Factors],
    method: str,
    options: Mapping[str, Any],
    errors: Mapping[str, Any],
) -> Adapter:
    recipe = {"method": method, "options": dict(options), "parents": [{"hash": adapter.hash, "name": adapter.name}]}
    # the parent's report is of how the parent was made
    card = {key: value for key, value in adapter.card.items() if key != "report"}
    return replace(adapter, layers=layers, card={**card, "recipe": recipe, "compression": dict(errors)})


def twin_merging(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    shared: Adapter,
    *,
    rank: Count = 8,
    progress: bool = True,
) -> ExpertPool:
    """Return {"shared": S, and by each expert's name cut(D_e - S)}: what Twin-Merging mixes (Lu et al., arXiv 2406.15479).

    S is what the experts have in common: any merge of them, such as `lw.merge(pool.adapters.values(), [0.3] * len(pool))`.
    `rank` is that of each difference, whose largest singular values stay; as the released code's, it is 8 by default.
    Router "twin_merging" weighs them for each text. Exclusive parts keep the description and the examples of their experts.

    Raises WeightingError for a pool with a "shared" of its own and a rank below 1, and what `merge` raises.
    """
    pool = ExpertPool.of(pool)
    check_options("twin_merging", {"rank": rank}, {"rank": Count})
    if "shared" in pool.names:
        raise WeightingError("twin_merging() calls the common part 'shared', and the pool has an expert of that name")
    parts = {"shared": replace(shared, name="shared")}
    for name in tracked(pool.names, "subtracting", total=len(pool), shown=progress):
        difference = merge([pool[name], shared], [1.0, -1.0], name=name, progress=False)
        part = byom(difference, rank)
        told = {key: value for key, value in pool[name].card.items() if key in ("description", "examples")}
        parts[name] = replace(part, card={**part.card, **told})
    return ExpertPool(parts)


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
    """Return the names, and cos_EE of the updates of all layers side by side, from the factors; a missing layer is zero.

    Gains and biases do not enter. Raises AdapterUnsupported for unbound updates, WeightingError for an update of zero,
    LayerMismatch for layers of several shapes.
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
    """Return inner_EF of the updates of two parts of a pool; the parts of a hub are names."""
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
