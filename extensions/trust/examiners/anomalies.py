"""Anomalies of an adapter beside the others of its base: size, shape of the spectrum, and near-duplicates.

A score is the number of robust standard deviations (1.4826 times the median absolute deviation) by which a feature of the
adapter differs from the median of the hub's adapters with the same base and layers. docs/anomalies.md has its reliability.
"""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from loraweave import Adapter, AdapterSuspicious, Anomaly, HubCorrupt, HubError
from loraweave.extend import algebra
from loraweave.extend.hubs import BlobStore, CatalogueStore, Connection, Prepared, rows, stored_adapter
from loraweave.extend.merging import cosine
from loraweave.extensions.trust.figures import Figures, alike, figures_of, reference

Array = NDArray[Any]

# a median of fewer others means little
MIN_REFERENCE = 12
# benign adapters of the example pool reach 3.3, each against the others (benchmarks/anomalies.py)
THRESHOLD = 3.5
# an update as large as the weight it changes replaces the layer
MAX_OF_BASE = 1.0
MIN_COSINE = 0.99

# smaller spreads (in logs) come from adapters too few or too alike, and count as these
_LAYER_FLOOR = 0.1
_FLOOR = 0.02


def against_pool(figures: Figures, reference: Sequence[tuple[Array, Array]]) -> list[Anomaly]:
    """Return the anomalies beyond `THRESHOLD` among comparable adapters; [] if `reference` has too few of them.

    `reference` has (log norms, dominances) by layer of each adapter with the same base and layers.
    """
    if len(reference) < MIN_REFERENCE:
        return []
    norm_NL, dominance_NL = (np.stack([pair[side] for pair in reference]) for side in (0, 1))
    with warnings.catch_warnings():
        # a layer that no adapter updates has no median
        warnings.simplefilter("ignore", RuntimeWarning)
        features_N4, names = _features(norm_NL, dominance_NL, norm_NL, dominance_NL)
        own_4 = _features(figures.log_norm_L[None], figures.dominance_L[None], norm_NL, dominance_NL)[0][0]
        middle_4, spread_4 = _robust(features_N4, _FLOOR)
    score_4 = (own_4 - middle_4) / spread_4
    anomalies = []
    for kind, score, value, middle in zip(names, score_4, own_4, middle_4, strict=True):
        # a spectrum is odd if too even or too uneven: a planted direction makes a dominated update less dominated
        if math.isfinite(score) and (abs(score) if kind == "spectrum" else score) > THRESHOLD:
            detail = _describe(kind, value, middle, figures, norm_NL, len(reference))
            anomalies.append(Anomaly(kind, detail, round(float(score), 2)))
    return anomalies


def against_model(adapter: Adapter, model: nn.Module) -> list[Anomaly]:
    """Return an anomaly for the layer whose update has the largest norm relative to the weight's, if above MAX_OF_BASE."""
    weights = dict(model.named_parameters())
    ratios = []
    for layer, factors in adapter.layers.items():
        weight = weights.get(f"{layer}.weight")
        size = 0.0 if weight is None else float(weight.detach().float().norm())
        if size and (ratio := algebra.norm(factors) / size) > MAX_OF_BASE:
            ratios.append((ratio, layer))
    if not ratios:
        return []
    ratio, layer = max(ratios)
    detail = f"that of {layer!r} is {ratio:.3g} times as large as the base's weight, and {len(ratios)} in all are larger"
    return [Anomaly("base_norm", f"of its updates {detail}", round(ratio, 2))]


def _features(norm_NL: Array, dominance_NL: Array, ref_norm_ML: Array, ref_dominance_ML: Array) -> tuple[Array, list[str]]:
    middle_L, spread_L = _robust(ref_norm_ML, _LAYER_FLOOR)
    # without the adapter's overall size, which is a separate feature
    beyond_NL = norm_NL - middle_L
    beyond_NL = (beyond_NL - _median(beyond_NL.T)[:, None]) / spread_L
    odd_L, odd_spread_L = _robust(ref_dominance_ML, _LAYER_FLOOR)
    features = {
        "norm": np.nanmean(norm_NL, axis=1),
        "layer_norm": np.nanmax(beyond_NL, axis=1),
        "spectrum": np.nanmean(dominance_NL, axis=1),
        "layer_spectra": np.nanmean(np.abs((dominance_NL - odd_L) / odd_spread_L), axis=1),
    }
    return np.stack(list(features.values()), axis=1), list(features)


def _robust(values_NF: Array, floor: float) -> tuple[Array, Array]:
    middle_F = _median(values_NF)
    return middle_F, np.maximum(1.4826 * _median(np.abs(values_NF - middle_F)), floor)


def _median(values_NF: Array) -> Array:
    """Return the median over the first axis, ignoring NaN; NaN if all are. Several times as fast as numpy's nanmedian."""
    ordered_NF = np.sort(values_NF, axis=0)
    count_F = (~np.isnan(ordered_NF)).sum(axis=0)
    low_F, high_F = np.maximum(count_F - 1, 0) // 2, np.minimum(count_F // 2, len(values_NF) - 1)
    middle_2F = np.take_along_axis(ordered_NF, np.stack([low_F, high_F]), axis=0)
    median_F: Array = middle_2F.mean(axis=0)
    return median_F


def _describe(kind: str, own: float, middle: float, figures: Figures, ref_norm_NL: Array, count: int) -> str:
    others = f"the median of {count} adapters of the same base and layers"
    if kind == "norm":
        return f"its updates are {math.exp(own - middle):.3g} times as large as {others} (geometric mean over layers)"
    if kind == "layer_norm":
        beyond_L = figures.log_norm_L - _median(ref_norm_NL)
        beyond_L = beyond_L - float(_median(beyond_L[:, None])[0])
        worst = int(np.nanargmax(beyond_L))
        return (
            f"the update of {figures.layers[worst]!r} is {math.exp(beyond_L[worst]):.3g} times as large as its other "
            f"layers and {others} let expect"
        )
    if kind == "spectrum":
        return f"the largest singular value has {_share(own):.0%} of a layer's energy, and {_share(middle):.0%} at {others}"
    return f"the shares of the largest singular value lie {own:.3g} deviations off by layer, and {middle:.3g} at {others}"


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


# the cosine is computed from stored factors for this many adapters, those with the nearest sketches
_MAX_COMPARED = 3

_logger = logging.getLogger(__name__)


class Anomalies:
    """The examiner that compares an adapter with the others of its base, and with the base's weights."""

    @staticmethod
    def measure(prepared: Prepared, blobs: BlobStore) -> Prepared:
        """Return the adapter with its figures, to compare and to store; no other adapter is read."""
        return replace(prepared, figures=figures_of(prepared.read(blobs), prepared.record.base_model))

    @staticmethod
    def examine(
        catalogue: CatalogueStore,
        blobs: BlobStore,
        prepared: Prepared,
        policies: Mapping[str, str],
        model: nn.Module | None = None,
    ) -> Prepared:
        """Return the adapter with its anomalies in the record, in quarantine if a policy says so, and with its figures.

        Raises AdapterSuspicious if the policy of an anomaly's kind refuses it.
        """
        if prepared.figures is None:
            prepared = Anomalies.measure(prepared, blobs)
        figures, record = prepared.figures, prepared.record
        with catalogue.reading() as connection:
            anomalies = against_pool(figures, reference(connection, figures, record.hash))
            near = [row for name in alike(connection, figures, record.name) if (row := _undamaged(connection, name))]
        anomalies += _duplicates(blobs, prepared, near)
        anomalies += against_model(prepared.read(blobs), model) if model is not None else []
        anomalies = [anomaly for anomaly in anomalies if policies[anomaly.kind] != "off"]
        refused = [anomaly for anomaly in anomalies if policies[anomaly.kind] == "refuse"]
        if refused:
            reasons = "; ".join(f"{anomaly.kind}: {anomaly.detail}" for anomaly in refused)
            raise AdapterSuspicious(
                f"adding adapter {record.name!r}: {reasons}; if it is what you want, add it with "
                'anomalies="report" or "quarantine"'
            )
        for anomaly in anomalies:
            _logger.info("adapter %r: %s: %s", record.name, anomaly.kind, anomaly.detail)
        quarantined = any(policies[anomaly.kind] == "quarantine" for anomaly in anomalies)
        return replace(prepared, record=replace(record, anomalies=tuple(anomalies), quarantined=quarantined))


def _undamaged(connection: Connection, name: str) -> rows.Row | None:
    """Return the row of that name; None if it is damaged, as adding the same content may repair it."""
    try:
        return rows.find(connection, name)
    except HubCorrupt:
        return None


def _duplicates(blobs: BlobStore, prepared: Prepared, near: list[rows.Row]) -> list[Anomaly]:
    """Return [an anomaly] for the most similar of the near adapters if its update has nearly the same direction, else []."""
    for row in near:
        if row.record.hash == prepared.record.hash:
            return [Anomaly("duplicate", f"it has the content of {row.record.name!r}", 1.0)]
    best = 0.0, ""
    for row in near[:_MAX_COMPARED]:
        try:
            score, _ = cosine(prepared.read(blobs), stored_adapter(blobs, row))
        except HubError as error:
            # a damaged adapter does not keep another from being added; verify reports it
            _logger.info("not compared with %r: %s", row.record.name, error)
            continue
        best = max(best, (score, row.record.name))
    if best[0] < MIN_COSINE:
        return []
    return [Anomaly("duplicate", f"its updates have a cosine of {best[0]:.4f} with those of {best[1]!r}", round(best[0], 4))]
