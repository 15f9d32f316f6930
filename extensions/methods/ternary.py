"""Adapters whose factors have three values, -c, 0 and c: ComPEFT (Yadav et al. 2023, arXiv 2311.13171)."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

from loraweave import Adapter, AdapterUnsupported
from loraweave.extend import Positive, Share, algebra, check_options, options_of

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
    recipe = {"method": "compeft", "options": options, "parents": [{"hash": adapter.hash, "name": adapter.name}]}
    # the parent's report is of how the parent was made
    card = {key: value for key, value in adapter.card.items() if key != "report"}
    errors = {"relative_error": (error / total) ** 0.5 if total else 0.0}
    return replace(adapter, layers=layers, card={**card, "recipe": recipe, "compression": errors})


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
