"""The weighted sum of updates, exactly: sum over e of w_e b_e a_e by concatenating ranks (PEFT calls it `cat`)."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.hub import algebra
from loraweave.types import Factors


def linear(experts: Sequence[Factors | None], weights: Sequence[float]) -> Factors | None:
    """One layer's sum over e of w_e * update_e, of rank sum of R_e; each weight enters once, on b.

    None stands for an expert without this layer, and is the answer when nothing is left. Gains and biases sum likewise.
    Raises LayerMismatch for updates of different shape, AdapterUnsupported for unbound ones.
    """
    terms = [
        algebra.scale(factors, weight)
        for factors, weight in zip(experts, weights, strict=True)
        if factors is not None and weight != 0.0
    ]
    return algebra.add(terms) if terms else None
