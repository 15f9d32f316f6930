"""PEFT's `magnitude_prune`: the largest entries of factors, summed apart."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.merge.methods._factor_space import align, largest, merge_rooted, weighted_sum
from loraweave.composer.merge.methods._terms import fraction
from loraweave.registry import traits
from loraweave.types import Factors


@traits("lossy", "by_factors")
def factor_magnitude_prune(
    experts: Sequence[Factors | None], weights: Sequence[float], *, density: float = 0.5
) -> Factors | None:
    """One layer's a and b, each the sum over experts of their int(density * size) entries of largest magnitude.

    PEFT's combination type "magnitude_prune": sqrt|w_e| on both sides, the sign of w_e on a. `density`, in [0, 1], is the
    fraction kept, of a and of b apart. Biases likewise, with w_e. On updates this is `magnitude_prune`. As the LoRA scale
    is part of b here, it is PEFT's result where all scales are equal. An expert without the layer adds nothing. Raises
    WeightingError for a density out of range, LayerMismatch for different ranks or shapes, AdapterUnsupported for gains
    and unbound updates.
    """
    fraction(density, "density", method="factor_magnitude_prune", zero=True)
    found = align(experts, weights, method="factor_magnitude_prune", twin="magnitude_prune")
    return merge_rooted(found, largest(density), weighted_sum)
