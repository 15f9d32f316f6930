"""Weights by layer, said in short: a group for each of a pool's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraweave.errors import WeightingError


def layer_groups(
    groups: Mapping[str, Sequence[str]] | None, layers: Sequence[str] | None, *, by_layer: bool
) -> Mapping[str, Sequence[str]] | None:
    """`groups` if given, else one for each of `layers`, else none: weights that all layers share, as without `by_layer`.

    Raises WeightingError for a layer named twice.
    """
    if groups is not None or layers is None or not by_layer:
        return groups
    if len(set(layers)) < len(layers):
        twice = next(layer for layer in layers if list(layers).count(layer) > 1)
        raise WeightingError(f"layers names {twice!r} twice; a layer has one weight for each expert")
    return {layer: (layer,) for layer in layers}
