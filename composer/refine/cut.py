"""A composition as an adapter of lower rank, with what that costs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from loraweave.composer.compression import byom
from loraweave.composer.refine.measured import adapter_loss, renewed
from loraweave.errors import CompositionError

if TYPE_CHECKING:
    from loraweave.composer.composition import Composition


def cut(composition: Composition, rank: int) -> Composition:
    """Every layer's update at most of `rank`, the best approximation of the merged one in the Frobenius norm.

    The report's reason has the rank before, the relative error of all layers together, and the loss before and after.
    """
    if composition.is_base:
        raise CompositionError("cannot cut the rank of this composition: it is the base model itself")
    started = time.perf_counter()
    whole = composition.adapter
    smaller = replace(byom(whole, rank), name=whole.name)
    error = smaller.card["compression"]["relative_error"]
    before, after = adapter_loss(composition, whole), adapter_loss(composition, smaller)
    return renewed(
        composition,
        "cut",
        f"rank {whole.rank} became {smaller.rank}, relative error {error:.3f}; loss {before:.3f} became {after:.3f}",
        loss=after,
        seconds=time.perf_counter() - started,
        evaluations=2,
        weights=composition.all_weights,
        by_layer=composition.by_layer,
        stored=smaller,
    )
