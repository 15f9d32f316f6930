"""When to say "use the base model": a threshold on the best score that lets through few inputs no adapter is for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loraweave.errors import RetrievalError

# normal quantile of a 95 % interval
_Z = 1.96


@dataclass(frozen=True)
class Abstention:
    """A search whose best score is below `threshold` finds nothing. `search` names the embedder, keys and fusion it is for.

    `false_accept` is the share of the foreign inputs that got through when it was calibrated, `false_accept_high` the upper
    end of its 95 % interval (Wilson), `accept` the share of the own inputs.
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
        """The lowest threshold at which at most the share `false_accept` of the foreign scores passes."""
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
            false_accept_high=_wilson_high(share, len(foreign_N)),
            accept=float((own_N >= threshold).mean()),
            num_own=len(own_N),
            num_foreign=len(foreign_N),
        )

    def save(self, path: str | Path) -> None:
        """Writes the threshold and how it came about as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Abstention:
        """Reads what `save` wrote. RetrievalError for anything else."""
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            if not math.isfinite(found.threshold):
                raise ValueError(f"threshold {found.threshold}")
        except (ValueError, TypeError) as error:
            raise RetrievalError(f"{path} holds no calibrated threshold: {error}; Abstention.save writes one") from error
        return found


def _wilson_high(share: float, count: int) -> float:
    centre = share + _Z * _Z / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    return min(1.0, (centre + spread) / (1 + _Z * _Z / count))
