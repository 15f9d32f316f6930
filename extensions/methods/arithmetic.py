"""Adapters as vectors: negation, sums, differences and analogies, all exact and without a model.

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
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

from loraweave import Adapter, AdapterUnsupported, ExpertPool, WeightingError, byom, merge
from loraweave.extend import Count, Fraction, NonNegative, Positive, Share, algebra, check_options, options_of, tracked


def negate(adapter: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return an adapter of update -D (Zhang et al. 2023, arXiv 2306.14870): one factor a layer, gains and biases negated.

    Negating twice gives the adapter itself, bit for bit. An unbound update is refused: what replaces the base's weight or
    bias has no opposite without the base.
    """
    negated = scale(adapter, -1.0, name=name, heads=heads)
    return negated if name else replace(negated, name=f"negated {adapter.name}")


def scale(adapter: Adapter, weight: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return the adapter times any finite weight but 0; with weight 1 the same factors, for an adapter of any kind."""
    return merge([adapter], [weight], name=name, heads=heads, progress=False)


def add(*adapters: Adapter, name: str | None = None, heads: str = "error") -> Adapter:
    """Return an adapter whose update is the sum of the updates of one or more adapters."""
    if not adapters:
        raise WeightingError("add() takes one adapter or more, and got none")
    return merge(adapters, [1.0] * len(adapters), name=name, heads=heads, progress=False)


def subtract(a: Adapter, b: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return an adapter whose update is that of `a` minus that of `b`."""
    return merge([a, b], [1.0, -1.0], name=name, heads=heads, progress=False)


def analogy(a: Adapter, b: Adapter, c: Adapter, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return the adapter a + b - c: "what is to b as a is to c" (task analogies, Ilharco et al. 2023, arXiv 2212.04089)."""
    return merge([a, b, c], [1.0, 1.0, -1.0], name=name, heads=heads, progress=False)


def unlearn(a: Adapter, b: Adapter, strength: float = 1.0, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return the adapter a - strength * b: a without what b learned; `strength` is 0 or more, and 0 gives a."""
    check_options("unlearn", {"strength": strength}, {"strength": NonNegative})
    return merge([a, b], [1.0, -strength], name=name, heads=heads, progress=False)


def ema(slow: Adapter, fast: Adapter, decay: float, *, name: str | None = None, heads: str = "error") -> Adapter:
    """Return one step of I-LoRA's moving average (Ren et al. 2024, arXiv 2402.18865): decay * slow + (1 - decay) * fast.

    As in the paper, the factors a and b are averaged separately (`factor_average`): the result has cross terms, and both
    adapters must have the same rank. `decay` is in [0, 1]: 1 returns slow, 0 fast.
    """
    check_options("ema", {"decay": decay}, {"decay": Fraction})
    return merge(
        [slow, fast], [decay, 1.0 - decay], method="factor_average", name=name or slow.name, heads=heads, progress=False
    )


def subtract_general(
    task: Adapter, generals: Sequence[Adapter], *, name: str | None = None, heads: str = "error"
) -> Adapter:
    """Return the task's update minus the mean of the generals' (GenKnowSub, arXiv 2505.10939); no generals give the task."""
    weights = [1.0] + [-1.0] * len(generals)
    return merge([task, *generals], weights, method="genknowsub", name=name, heads=heads, progress=False)


def genknowsub(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    generals: Iterable[Adapter] | Mapping[str, Adapter],
    *,
    progress: bool = True,
) -> ExpertPool:
    """Return the pool with the generals' mean update subtracted from each one's (GenKnowSub, arXiv 2505.10939), names kept.

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


FACTORS = ("a_RI", "b_OR")


def compeft(
    adapter: Adapter,
    *,
    density: Share = 0.2,
    scale: Positive | Literal["least_squares"] = 1.0,
    per: Literal["adapter", "tensor"] = "adapter",
) -> Adapter:
    """Return the adapter with each entry of its factors a and b replaced by -c, 0 or c: ComPEFT (Yadav et al. 2023, Alg. 1).

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
    recipe = {"method": "compeft", "options": options, "parents": [{"hash": adapter.hash, "name": adapter.name}]}
    # the parent's report does not describe this adapter
    card = {key: value for key, value in adapter.card.items() if key != "report"}
    errors = {"relative_error": (error / total) ** 0.5 if total else 0.0}
    return replace(adapter, layers=layers, card={**card, "recipe": recipe, "compression": errors})


def _ternary(tau: Tensor, density: float, scale: float | str, where: str) -> Tensor:
    """Return c * sign(tau) at the `density` share of largest entries of a vector tau, zero elsewhere; c is by `scale`.

    Raises AdapterUnsupported, which names the tensors as `where`, if the standard deviation is 0.
    """
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
    """Return a boolean mask of the `count` largest entries, of equal ones the first; an entry of zero is never chosen."""
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    least = magnitude.kthvalue(magnitude.numel() - count + 1).values
    kept = magnitude > least
    ties = (magnitude == least).nonzero()[: count - int(kept.sum()), 0]
    kept[ties] = True
    return kept & (magnitude > 0)
