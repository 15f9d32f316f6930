"""A pool without what general knowledge has in it: GenKnowSub, before any router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraweave.composer.arithmetic import subtract_general
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.hub.progress import tracked


def genknowsub(
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    generals: Iterable[Adapter] | Mapping[str, Adapter],
    *,
    progress: bool = True,
) -> ExpertPool:
    """The pool with D_e - mean of D_g in the place of each D_e (GenKnowSub, arXiv 2505.10939), under the same names.

    The general adapters are, say, trained on a language's encyclopedia. Updates are subtracted, exactly, so that ranks add
    up; PEFT's Arrow subtracts the mean of a and the mean of b apart, which leaves cross terms (0.5 of the update's norm on
    random factors). Raises WeightingError without general adapters, and what `subtract_general` raises.
    """
    pool = pool if isinstance(pool, ExpertPool) else ExpertPool(pool)
    subtracted = list(generals.values()) if isinstance(generals, Mapping) else list(generals)
    if not subtracted:
        raise WeightingError("genknowsub() subtracts the mean of general adapters, and got none: the pool is as it was")
    names = tracked(pool.names, "subtracting", total=len(pool), shown=progress)
    return ExpertPool({name: subtract_general(pool[name], subtracted, name=name) for name in names})
