"""Mixtures by denoising step, for `Composer(pipe).activate(...)`: functions from (step, steps) to a mixture."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from loraweave import Adapter, Factors, MixtureWeights, WeightingError
from loraweave.extend import algebra, is_list, is_whole
from loraweave.extensions.diffusion.hooks.diffusers_pipeline import Composite

# (step from 0, number of steps) -> mixture
Schedule = Callable[[int, int], Mapping[str, float] | MixtureWeights]


def switch(names: Sequence[str], *, every: int = 1, weight: float = 1.0) -> Schedule:
    """Return a schedule that takes the experts in turn, each for `every` steps.

    At step s the expert is names[floor(s / every) mod len(names)], for text encoders the first. This is LoRA Switch of
    Multi-LoRA Composition (2402.16843), whose code has the first expert one step longer. Raises WeightingError for no names,
    or for `every` below 1.
    """
    if not names or not is_list(names, str) or not is_whole(every, 1):
        raise WeightingError(f"switch() takes a list of names and every=1 or more steps, not {names!r} and every={every!r}")
    return lambda step, steps: {names[step // every % len(names)]: weight}


def composite(names: Sequence[str], *, weight: float = 1.0) -> Composite:
    """Return the mixture whose prediction averages the predictions under each expert alone: LoRA Composite (2402.16843)."""
    if not is_list(names, str):
        raise WeightingError(f"composite() takes a list of names, not {names!r}")
    return Composite(tuple({name: weight} for name in names))


def k_lora(content: Adapter, style: Adapter, *, alpha: float = 1.5, beta: float = 0.5) -> Schedule:
    """Return a schedule that uses one of two adapters alone in each layer and step.

    A layer uses the content adapter at a step where

        topK |B_c A_c| / gamma > topK |B_s A_s| * (alpha step / steps + beta),    K = rank_c * rank_s,

    topK being the sum of the K largest entries and gamma the mean, over the layers of both, of the ratio of the sums of all
    entries. A layer that only one adapter updates uses that one. Dense updates are made one layer at a time, once.

    K-LoRA (2502.18461), after its authors' code (klora.py, utils.py), which has K = 64, that of rank 8, and counts the calls
    of layers instead of steps. Pool names are the adapters' own. Raises WeightingError if they share no layer, or have the
    same name, AdapterUnsupported for DoRA and (IA)3, whose update is not a matrix by itself.
    """
    both = [layer for layer in content.layers if layer in style.layers]
    if not both or content.name == style.name:
        raise WeightingError(f"k_lora() takes two adapters of shared layers, not {content.name!r} and {style.name!r}")
    ratios, tops = [], {}
    for layer in both:
        parts = content.layers[layer], style.layers[layer]
        sums = [_sums(factors, parts[0].rank * parts[1].rank) for factors in parts]
        tops[layer] = sums[0][0], sums[1][0]
        ratios.append(sums[0][1] / sums[1][1] if sums[1][1] else math.inf)
    gamma = sum(ratios) / len(ratios)
    alone = {layer: adapter.name for adapter in (content, style) for layer in adapter.layers if layer not in tops}

    def chosen(step: int, steps: int) -> MixtureWeights:
        scale = alpha * step / steps + beta
        names = {layer: content.name if of_c > of_s * scale * gamma else style.name for layer, (of_c, of_s) in tops.items()}
        return MixtureWeights.of_layers(
            {layer: {name: 1.0} for layer, name in {**names, **alone}.items()}, [content.name, style.name]
        )

    return chosen


@torch.no_grad()
def _sums(factors: Factors, k: int) -> tuple[float, float]:
    """Return (the sum of the k largest absolute entries of B A, the sum of all)."""
    entries = algebra.delta(factors).abs().flatten()
    return float(entries.topk(min(k, len(entries))).values.sum()), float(entries.sum())
