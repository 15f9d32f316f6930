"""Adapters as vectors: negation, sums, differences, analogies, and what is made of them. All exact, without a model.

Each function is a merge with fixed weights: the result is an adapter whose card has the recipe and
whose `report` the figures. Every one takes `name`, that of the result, and `heads`, which says what becomes of
trained heads: whole tensors that replace the base's and do not add up ("error", "first" or "average").

All raise AdapterUnsupported for updates that need the base layer (DoRA's magnitude, a trained base bias) unless one comes
back as it is, BaseModelMismatch and LayerMismatch for adapters that do not fit together, WeightingError for numbers out of
range, CompositionError for heads that need a choice. Nothing that is given changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loraweave import Adapter, ExpertPool, WeightingError, byom, merge
from loraweave.extend import Count, Fraction, NonNegative, check_options, tracked


def negate(adapter: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return -D (Zhang et al. 2023, arXiv 2306.14870): one factor of each layer, gains and biases change their sign.

    Twice is the adapter itself, bit for bit. An unbound update is refused: what replaces the base's weight or bias has no
    opposite without the base.
    """
    negated = scale(adapter, -1.0, name=name, heads=heads)
    return negated if name else replace(negated, name=f"negated {adapter.name}")


def scale(adapter: Adapter, weight: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return weight * D, for any finite weight but 0; with weight 1 the same factors, for an adapter of any kind."""
    return merge([adapter], [weight], name=name, heads=heads, progress=False)


def add(*adapters: Adapter, name: str | None = None, heads: str = "error") -> Adapter:
    """Return the sum of the D_e of one or more adapters."""
    if not adapters:
        raise WeightingError("add() takes one adapter or more, and got none")
    return merge(adapters, [1.0] * len(adapters), name=name, heads=heads, progress=False)


def subtract(a: Adapter, b: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return D_a - D_b."""
    return merge([a, b], [1.0, -1.0], name=name, heads=heads, progress=False)


def analogy(a: Adapter, b: Adapter, c: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return D_a + D_b - D_c: "what is to b as a is to c" (task analogies, Ilharco et al. 2023, arXiv 2212.04089)."""
    return merge([a, b, c], [1.0, 1.0, -1.0], name=name, heads=heads, progress=False)


def unlearn(a: Adapter, b: Adapter, strength: float = 1.0, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return D_a - strength * D_b: a without what b learned; `strength` is 0 or more, and 0 gives a."""
    check_options("unlearn", {"strength": strength}, {"strength": NonNegative})
    return merge([a, b], [1.0, -strength], name=name, heads=heads, progress=False)


def ema(slow: Adapter, fast: Adapter, decay: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return one step of I-LoRA's moving average (Ren et al. 2024, arXiv 2402.18865): decay * slow + (1 - decay) * fast.

    It is taken on a and on b apart, as there (`factor_average`), so that cross terms are part of it, and both have one rank.
    `decay` is in [0, 1]: 1 leaves slow, 0 takes fast.
    """
    check_options("ema", {"decay": decay}, {"decay": Fraction})
    return merge(
        [slow, fast], [decay, 1.0 - decay], method="factor_average", name=name or slow.name, heads=heads, progress=False
    )


def subtract_general(
    task: Adapter, generals: Sequence[Adapter], *, name: str | None = None, heads: str = "error"
) -> Adapter:
    """Return D_task minus the mean of the generals' updates (GenKnowSub, arXiv 2505.10939); no generals give the task."""
    weights = [1.0] + [-1.0] * len(generals)
    return merge([task, *generals], weights, method="genknowsub", name=name, heads=heads, progress=False)


def genknowsub(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    generals: Iterable[Adapter] | Mapping[str, Adapter],
    *,
    progress: bool = True,
) -> ExpertPool:
    """Return the pool with each D_e replaced by D_e - mean of D_g (GenKnowSub, arXiv 2505.10939), under the same names.

    The general adapters are, say, trained on a language's encyclopedia. Updates are subtracted, exactly, so that ranks add
    up; PEFT's Arrow subtracts the mean of a and the mean of b apart, which leaves cross terms (0.5 of the update's norm on
    random factors). Raises WeightingError without general adapters, and what `subtract_general` raises.
    """
    pool = ExpertPool.of(pool)
    subtracted = list(generals.values()) if isinstance(generals, Mapping) else list(generals)
    if not subtracted:
        raise WeightingError("genknowsub() subtracts the mean of general adapters, and got none: the pool is as it was")
    names = tracked(pool.names, "subtracting", total=len(pool), shown=progress)
    return ExpertPool({name: subtract_general(pool[name], subtracted, name=name) for name in names})


def twin_merging(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    shared: Adapter,
    *,
    rank: Count = 8,
    progress: bool = True,
) -> ExpertPool:
    """Return {"shared": S, and by each expert's name cut(D_e - S)}: what Twin-Merging mixes (Lu et al., arXiv 2406.15479).

    S is what the experts have in common: any merge of them, such as `merge(pool.adapters.values(), [0.3] * len(pool))`.
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
