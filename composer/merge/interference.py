"""The figures of how far a merge's experts pull the same way in a layer, from their factors: no dense update is formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraweave.hub.adapter import Adapter
from loraweave.hub.merge_report import LayerReport, MergeReport
from loraweave.lowrank.truncation import among, summed_by_owner
from loraweave.types import Factors

Array = NDArray[Any]

# entries looked at for the sign conflict are the crossings of at most so many rows and columns, evenly spaced
MAX_SIDE = 128


class Interference(NamedTuple):
    """The figures of the weighted updates w_e D_e of one layer; an expert without it has norm 0 and cosines of 0.

    `norms` are Frobenius norms, one for each expert. `cosines` are <D_i, D_j> / (|D_i| |D_j|) with the weights' signs, for
    the pairs (0, 1), (0, 2), ..., (1, 2), ... `sign_conflict` is the share of entries in which two experts have opposite
    signs, 0 to 1, of those where any is not zero; it is exact for layers of at most 128 x 128 and sampled evenly above.
    """

    norms: tuple[float, ...]
    cosines: tuple[float, ...]
    sign_conflict: float


def interference(
    experts: Sequence[Factors | None], weights: Sequence[float], *, inner_EE: Array | None = None
) -> Interference:
    """Return the figures of one layer. Updates that depend on the base layer (DoRA, (IA)3) count by their b a alone.

    `inner_EE` has <w_i D_i, w_j D_j> of the experts that have the layer, for callers that know it; fp32 products find it
    otherwise.
    """
    present = [place for place, factors in enumerate(experts) if factors is not None]
    kept = [(factors, weight) for factors, weight in zip(experts, weights, strict=True) if factors is not None]
    a_ERI = [factors.a_RI.detach().cpu().float().numpy() for factors, _ in kept]
    b_EOR = [factors.b_OR.detach().cpu().float().numpy() for factors, _ in kept]
    w_E = np.array([float(weight) for _, weight in kept])
    if inner_EE is None:
        inner_EE = _inner(a_ERI, b_EOR, w_E) if kept else np.zeros((0, 0))
    if len(present) < len(experts):
        inner_EE = among(inner_EE, present, len(experts))
    norms_E = np.sqrt(np.maximum(inner_EE.diagonal(), 0.0))
    scale_EE = norms_E * norms_E[:, None]
    cosines_EE = np.divide(inner_EE, scale_EE, out=np.zeros_like(scale_EE), where=scale_EE > 0).clip(-1.0, 1.0)
    above = [row[first + 1 :] for first, row in enumerate(cosines_EE.tolist())]
    return Interference(tuple(norms_E.tolist()), tuple(chain.from_iterable(above)), _sign_conflict(a_ERI, b_EOR, w_E))


def mixture_interference(adapters: Sequence[Adapter], by_layer: Mapping[str, Sequence[float]]) -> MergeReport:
    """Return how far the weighted updates pull the same way in each layer, as a report without a merge: its ranks are 0.

    `by_layer` has a weight of every adapter for each layer; the report's own weights are their means over the layers.
    """
    layers = {}
    for layer, weights in by_layer.items():
        figures = interference([adapter.layers.get(layer) for adapter in adapters], weights)
        layers[layer] = LayerReport(0, 0, 0.0, figures.norms, figures.cosines, figures.sign_conflict)
    means = tuple(map(fmean, zip(*by_layer.values(), strict=True)))
    return MergeReport("linear", tuple(adapter.name for adapter in adapters), means, layers)


def _inner(a_ERI: Sequence[Array], b_EOR: Sequence[Array], w_E: Array) -> Array:
    """Return <w_i D_i, w_j D_j> of every pair, from two symmetric S x S products of the stacked factors."""
    a_SI, b_OS = np.concatenate(a_ERI), np.concatenate(b_EOR, axis=1)
    product_SS = (a_SI @ a_SI.T).astype(np.float64) * (b_OS.T @ b_OS)
    inner_EE: Array = summed_by_owner(product_SS, list(map(len, a_ERI))) * w_E * w_E[:, None]
    return inner_EE


def _sign_conflict(a_ERI: Sequence[Array], b_EOR: Sequence[Array], w_E: Array) -> float:
    if len(w_E) < 2:
        return 0.0
    rows, columns = _space_evenly(b_EOR[0].shape[0]), _space_evenly(a_ERI[0].shape[1])
    low: Any = 0.0
    high: Any = 0.0
    for a_RI, b_OR, weight in zip(a_ERI, b_EOR, w_E.tolist(), strict=True):
        part = (b_OR[rows] * weight).astype(np.float32) @ a_RI[:, columns]
        low, high = np.minimum(low, part), np.maximum(high, part)
    below, above = low < 0, high > 0
    touched = int(np.count_nonzero(below | above))
    return int(np.count_nonzero(below & above)) / touched if touched else 0.0


def _space_evenly(size: int) -> slice:
    """Return at most `MAX_SIDE` of `size` places: every n-th of them."""
    step = -(-size // MAX_SIDE)
    return slice(step // 2, None, step)
