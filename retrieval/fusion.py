"""Fusion of several keys' scores into one score, and a threshold below which a search finds no adapter.

The fused score is a mean of scores or of reciprocal ranks, or a learned probability. `Abstention` is the threshold: if the
best score is below it, the base model answers. Few inputs without a fitting adapter reach it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from loraweave.errors import RetrievalError

KINDS = ("mean", "reciprocal_rank", "logistic")

# The score of a rank halves over this many ranks (Cormack, Clarke and Buettcher 2009, who use 60 for lists of 1,000).
RANK_CONSTANT = 60

# the 97.5 % quantile of the normal distribution
Z = 1.959963984540054

# the relation of output to input is coarse: it decides among adapters whose inputs and outputs fit alike
_MEAN_WEIGHTS = {"relation": 0.3}


@dataclass(frozen=True)
class Fusion:
    """A way to fuse keys' scores. Weights not in `weights` are 1, for `relation` in a mean 0.3, and in "logistic" 0.

    "mean": the weighted mean of the scores, -1 to 1. "reciprocal_rank": the weighted mean of 61 / (60 + rank), 0 to 1, which
    needs no common scale. "logistic": the probability that an adapter is the right one, from scores that are standardised
    over the adapters of a query; `fit` learns its weights. A NaN counts as the mean of the key's scores.
    """

    kind: str = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    intercept: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RetrievalError(f"fusion {self.kind!r} is unknown; there are {', '.join(KINDS)}")

    def fuse(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the fused scores_N, NaN where all keys score NaN. Raises RetrievalError if the weights sum to 0 or less."""
        useful = {name: scores_N for name, scores_N in parts.items() if not np.isnan(scores_N).all()}
        if not useful:
            return np.full(len(next(iter(parts.values()))), np.nan)
        if self.kind == "logistic":
            logits_N = standardise(useful) @ np.array([self.weights.get(name, 0.0) for name in useful]) + self.intercept
            fused_N = 0.5 * (1.0 + np.tanh(0.5 * logits_N))
        else:
            defaults = _MEAN_WEIGHTS if self.kind == "mean" else {}
            weights_K = np.array([self.weights.get(name, defaults.get(name, 1.0)) for name in useful])
            if not weights_K.sum() > 0:
                raise RetrievalError(
                    f"the weights of {', '.join(useful)} sum to {weights_K.sum():g}; they must be above 0 in all"
                )
            shape = _ranks if self.kind == "reciprocal_rank" else _fill
            columns_NK = np.stack([shape(scores_N) for scores_N in useful.values()], axis=1)
            fused_N = columns_NK @ weights_K / weights_K.sum()
        return np.where(np.isnan(list(useful.values())).all(axis=0), np.nan, fused_N)

    @classmethod
    def fit(cls, searches: Iterable[tuple[Mapping[str, np.ndarray], int]]) -> Fusion:
        """Return a logistic fusion learned from searches: (each key's scores_N, the position of the right adapter)."""
        from sklearn.linear_model import LogisticRegression

        rows: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        names: list[str] = []
        for parts, right in searches:
            names = names or list(parts)
            rows.append(standardise({name: parts[name] for name in names}))
            labels.append(np.arange(len(rows[-1])) == right)
        if not rows or not any(label_N.any() and not label_N.all() for label_N in labels):
            raise RetrievalError(
                f"cannot learn weights from {len(rows)} searches: at least one must have the right adapter among several"
            )
        model = LogisticRegression(max_iter=1000).fit(np.concatenate(rows), np.concatenate(labels))
        weights = {name: round(float(weight), 6) for name, weight in zip(names, model.coef_[0], strict=True)}
        return cls("logistic", weights, round(float(model.intercept_[0]), 6))

    def save(self, path: str | Path) -> None:
        """Write the fusion's kind, weights and intercept to a JSON file."""
        Path(path).write_text(json.dumps({**asdict(self), "weights": dict(self.weights)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Fusion:
        """Read what `save` wrote. Raises RetrievalError for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            weights = {str(name): float(weight) for name, weight in content["weights"].items()}
            fusion = cls(str(content["kind"]), weights, float(content["intercept"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RetrievalError(
                f"{path} holds no fusion (kind, weights, intercept): {error!r}; Fusion.save writes one"
            ) from error
        if not np.isfinite([*weights.values(), fusion.intercept]).all():
            raise RetrievalError(f"{path} holds weights that are not finite: {weights}")
        return fusion


def standardise(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scale each key's scores to mean 0 and deviation 1 over N adapters (N, K); equal scores, and NaN, become 0."""
    columns = []
    for scores_N in parts.values():
        filled_N = _fill(scores_N)
        spread = float(filled_N.std())
        columns.append((filled_N - filled_N.mean()) / spread if spread > 1e-9 else np.zeros(len(filled_N)))
    return np.stack(columns, axis=1)


def _fill(scores_N: np.ndarray) -> np.ndarray:
    """Replace NaN by the mean of the other scores, or by 0 if all are NaN."""
    known_N = ~np.isnan(scores_N)
    return np.where(known_N, scores_N, scores_N[known_N].mean() if known_N.any() else 0.0)


def _ranks(scores_N: np.ndarray) -> np.ndarray:
    """Return (RANK_CONSTANT + 1) / (RANK_CONSTANT + rank), the best at rank 1; equal scores share their best rank."""
    filled_N = _fill(scores_N)
    better_N = len(filled_N) - np.searchsorted(np.sort(filled_N), filled_N, side="right")
    return (RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + better_N)


def wilson(share: float, count: float, drawn_R: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a `share`, 0 to 1, of `count` independent answers, above 0, after Wilson (1927).

    The interval has a width even if all answers are right, or none is. If the answers are not independent, for instance over
    several seeds or tasks, pass R bootstrap draws of the share as `drawn_R`: the interval then counts as many independent
    answers as would have the draws' variance, the effective sample size (Franco, Little, Louis and Slud 2019, Journal of
    Survey Statistics and Methodology 7). Draws that are all equal are ignored.
    """
    if drawn_R is not None and float(np.ptp(drawn_R)) >= 1e-9 and share not in (0, 1):
        count = share * (1 - share) / float(np.var(drawn_R))
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + Z * Z / count) for sign in (-1, 1))
    # 0 and 1 are limits of themselves, which rounding misses
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def share_text(share: float, count: int) -> str:
    """Return a share of `count` answers and its `wilson` interval, such as "60% (23-88)"; the share alone if count is 0."""
    return f"{share:.0%} ({'-'.join(f'{100 * limit:.0f}' for limit in wilson(share, count))})" if count else f"{share:.0%}"


@dataclass(frozen=True)
class Abstention:
    """A threshold below which a search's best score counts as nothing, for the embedder, keys and fusion in `search`.

    In the calibration, `false_accept` is the share of foreign inputs (those without an adapter) that reached the threshold,
    `false_accept_high` the upper end of its 95 % Wilson interval, `accept` the share of own inputs (those with one).
    """

    threshold: float
    search: str
    inputs_per_query: int
    target_false_accept: float
    false_accept: float
    false_accept_high: float
    accept: float
    num_own: int
    num_foreign: int

    @classmethod
    def calibrated(
        cls,
        own_scores: Sequence[float],
        foreign_scores: Sequence[float],
        *,
        false_accept: float,
        search: str = "",
        inputs_per_query: int = 1,
    ) -> Abstention:
        """Choose the lowest threshold at which at most the share `false_accept` of the foreign scores passes."""
        if not 0.0 <= false_accept < 1.0:
            raise RetrievalError(f"false_accept is {false_accept!r}; it is a share and must be at least 0 and below 1")
        if not own_scores or not foreign_scores:
            raise RetrievalError(
                f"a threshold needs scores of both kinds, but there are {len(own_scores)} of own and {len(foreign_scores)} "
                "of foreign inputs; pass some inputs of each"
            )
        own_N, foreign_N = np.array(own_scores, dtype=np.float64), np.sort(np.array(foreign_scores, dtype=np.float64))[::-1]
        num_allowed = math.floor(false_accept * len(foreign_N) + 1e-9)
        # the best that must not pass; the threshold is the next score that a search can report
        threshold = round(float(foreign_N[num_allowed]) + 1e-6, 6)
        share = float((foreign_N >= threshold).mean())
        return cls(
            threshold=threshold,
            search=search,
            inputs_per_query=inputs_per_query,
            target_false_accept=false_accept,
            false_accept=share,
            false_accept_high=wilson(share, len(foreign_N))[1],
            accept=float((own_N >= threshold).mean()),
            num_own=len(own_N),
            num_foreign=len(foreign_N),
        )

    def save(self, path: str | Path) -> None:
        """Write the threshold and the figures of its calibration as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Abstention:
        """Read what `save` wrote. Raises RetrievalError for anything else."""
        try:
            abstention = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            if not math.isfinite(abstention.threshold):
                raise ValueError(f"threshold {abstention.threshold}")
        except (ValueError, TypeError) as error:
            raise RetrievalError(f"{path} holds no calibrated threshold: {error}; Abstention.save writes one") from error
        return abstention
