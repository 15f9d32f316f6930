"""Adapters as vectors: negation, sums, differences, analogies, and what is made of them. All exact, without a model.

Each function is a merge (`loraweave.composer.merge.merge`) with fixed weights: the result is an adapter whose card has the
recipe and whose `report` the figures. Every one takes `name`, that of the result, and `heads`, which says what becomes of
trained heads: whole tensors that replace the base's and do not add up ("error", "first" or "average").

All raise AdapterUnsupported for updates that need the base layer (DoRA's magnitude, a trained base bias) unless one comes
back as it is, BaseModelMismatch and LayerMismatch for adapters that do not fit together, WeightingError for numbers out of
range, CompositionError for heads that need a choice. Nothing that is given changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.merge import merge
from loraweave.composer.option_kinds import is_of_kind
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter


def negate(adapter: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """-D (Zhang et al. 2023, arXiv 2306.14870): one factor of each layer, gains and biases change their sign.

    Twice is the adapter itself, bit for bit. An unbound update is refused: what replaces the base's weight or bias has no
    opposite without the base.
    """
    return scale(adapter, -1.0, name=name or f"negated {adapter.name}", heads=heads)


def scale(adapter: Adapter, weight: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """weight * D, for any finite weight but 0; with weight 1 the same factors, for an adapter of any kind."""
    return merge([adapter], [weight], name=name, heads=heads, progress=False)


def add(*adapters: Adapter, name: str | None = None, heads: str = "error") -> Adapter:
    """The sum of D_e: one or more adapters."""
    if not adapters:
        raise WeightingError("add() takes one adapter or more, and got none")
    return merge(adapters, [1.0] * len(adapters), name=name, heads=heads, progress=False)


def subtract(a: Adapter, b: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """D_a - D_b."""
    return merge([a, b], [1.0, -1.0], name=name, heads=heads, progress=False)


def analogy(a: Adapter, b: Adapter, c: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """D_a + D_b - D_c: "what is to b as a is to c" (task analogies, Ilharco et al. 2023, arXiv 2212.04089)."""
    return merge([a, b, c], [1.0, 1.0, -1.0], name=name, heads=heads, progress=False)


def unlearn(a: Adapter, b: Adapter, strength: float = 1.0, *, name: str | None = None, heads: str = "error") -> Adapter:
    """D_a - strength * D_b: a without what b learned; `strength` is 0 or more, and 0 gives a."""
    if not is_of_kind(strength, float) or strength < 0.0:
        raise WeightingError(f"unlearn: strength={strength!r} is not a finite number of 0 or more; add() adds")
    return merge([a, b], [1.0, -strength], name=name, heads=heads, progress=False)


def ema(slow: Adapter, fast: Adapter, decay: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """One step of I-LoRA's moving average (Ren et al. 2024, arXiv 2402.18865): decay * slow + (1 - decay) * fast.

    On a and on b apart, as there (`factor_average`), so cross terms are part of it, and both have one rank. `decay` is in
    [0, 1]: 1 leaves slow, 0 takes fast.
    """
    if not is_of_kind(decay, float) or not 0.0 <= decay <= 1.0:
        raise WeightingError(f"ema: decay={decay!r} is outside [0, 1]")
    return merge(
        [slow, fast], [decay, 1.0 - decay], method="factor_average", name=name or slow.name, heads=heads, progress=False
    )


def subtract_general(
    task: Adapter, generals: Sequence[Adapter], *, name: str | None = None, heads: str = "error"
) -> Adapter:
    """D_task minus the mean of the generals' updates (GenKnowSub, arXiv 2505.10939); no generals give the task."""
    weights = [1.0] + [-1.0] * len(generals)
    return merge([task, *generals], weights, method="genknowsub", name=name, heads=heads, progress=False)
